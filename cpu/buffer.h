// Memory for results and scratch.
#ifndef FLASHJAX_CPU_BUFFER_H_
#define FLASHJAX_CPU_BUFFER_H_

#include <sys/mman.h>

#include <cstddef>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace flashjax {

// A large one has pages of its own, which the system gets back when it is freed. In a thread's heap
// the C library would keep much of what is freed, for each of many threads.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_(bytes) {
    if (bytes_ < kPagesFromBytes) {
      data_ = ::operator new(bytes_);
      return;
    }
    data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data_ == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    madvise(data_, bytes_, MADV_HUGEPAGE);  // a kernel may have none: no matter
#endif
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    if (bytes_ < kPagesFromBytes) {
      ::operator delete(data_);
    } else {
      munmap(data_, bytes_);
    }
  }

  void* data() const { return data_; }

 private:
  static constexpr size_t kPagesFromBytes = 1 << 20;
  size_t bytes_;
  void* data_;
};

// Buffers of one size for the threads of a loop: as many as work at a time.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : bytes_(bytes) {}

  // One that is in use until this goes; what is in it is undefined.
  class Lease {
   public:
    explicit Lease(Scratch& scratch) : scratch_(scratch), buffer_(scratch.Take()) {}
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    ~Lease() { scratch_.GiveBack(std::move(buffer_)); }

    template <typename T>
    T* data() const {
      return static_cast<T*>(buffer_->data());
    }

   private:
    Scratch& scratch_;
    std::unique_ptr<Buffer> buffer_;
  };

 private:
  std::unique_ptr<Buffer> Take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (free_.empty()) {
      free_.reserve(++made_);  // giving back must not fail
      return std::make_unique<Buffer>(bytes_);
    }
    std::unique_ptr<Buffer> buffer = std::move(free_.back());
    free_.pop_back();
    return buffer;
  }

  void GiveBack(std::unique_ptr<Buffer> buffer) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(buffer));
  }

  size_t bytes_;
  std::mutex mutex_;
  size_t made_ = 0;
  std::vector<std::unique_ptr<Buffer>> free_;
};

}  // namespace flashjax

#endif  // FLASHJAX_CPU_BUFFER_H_
