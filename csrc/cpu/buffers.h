// SPDX-License-Identifier: Apache-2.0
// Memory that a thread keeps from call to call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

namespace mio_ext {

// Memory a thread keeps for its next call. Where a batch is small, fresh pages cost as much as half the
// arithmetic, and a training loop asks for the same sizes at every step.
class Reserve {
 public:
  static Reserve& of_this_thread() {
    thread_local Reserve reserve;
    return reserve;
  }
  ~Reserve() { keep_at_most(0); }

  void* take(size_t bytes) {
    for (auto block = blocks_.begin(); block != blocks_.end(); ++block)
      if (block->bytes == bytes) {
        void* memory = block->memory;
        kept_ -= bytes;
        blocks_.erase(block);
        return memory;
      }
    return ::operator new(bytes, kLine);
  }

  void give(void* memory, size_t bytes) {
    blocks_.push_back({memory, bytes});
    kept_ += bytes;
    keep_at_most(kMaxKept);
  }

 private:
  static constexpr std::align_val_t kLine{64};
  static constexpr size_t kMaxKept = size_t{8} << 20;
  struct Block {
    void* memory;
    size_t bytes;
  };

  void keep_at_most(size_t limit) {
    while (kept_ > limit) {
      ::operator delete(blocks_.front().memory, kLine);
      kept_ -= blocks_.front().bytes;
      blocks_.erase(blocks_.begin());
    }
  }

  std::vector<Block> blocks_;  // the oldest first
  size_t kept_ = 0;
};

// Uninitialised memory on a cache line.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    if (data_) Reserve::of_this_thread().give(data_, bytes_);
  }
  void allocate(int64_t count) {
    bytes_ = static_cast<size_t>(count) * sizeof(T);
    data_ = static_cast<T*>(Reserve::of_this_thread().take(bytes_));
  }
  T* data() { return data_; }
  const T* data() const { return data_; }

 private:
  T* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace mio_ext
