// Memory that is zero without being written: the kernel fills pages when they are first touched.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <new>
#include <utility>

namespace lmcn {

/// A private anonymous mapping. Throws std::bad_alloc like any other allocation.
class ZeroedPages {
 public:
  explicit ZeroedPages(std::size_t bytes)
      : data_(::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)), bytes_(bytes) {
    if (data_ == MAP_FAILED) throw std::bad_alloc();
  }
  ZeroedPages(ZeroedPages&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  ZeroedPages& operator=(ZeroedPages&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~ZeroedPages() {
    if (data_ != nullptr) ::munmap(data_, bytes_);
  }

  /// Gives back the memory of [offset, offset + bytes), page-aligned; it reads as zero from now on. Spreads what unmapping costs.
  void discard(std::size_t offset, std::size_t bytes) noexcept {
    ::madvise(static_cast<std::byte*>(data_) + offset, bytes, MADV_DONTNEED);
  }

  void* data() noexcept { return data_; }
  const void* data() const noexcept { return data_; }
  std::size_t bytes() const noexcept { return bytes_; }

 private:
  void* data_;
  std::size_t bytes_;
};

}  // namespace lmcn
