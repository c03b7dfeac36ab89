// One io_uring: set-up, registered files and buffers, and the submission and completion queues. No threads, no policy.
#pragma once

#include <liburing.h>

#include <array>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "io/transfer.hpp"
#include "lmcn/status.hpp"

namespace lmcn::io {

/// Used by one thread, the one that calls open(): the kernel then runs completions only when that thread asks for them and
/// never interrupts or cancels on behalf of threads that come and go.
class UringRing {
 public:
  struct Completion {
    std::uint64_t user_data;
    int answer;  // bytes or -errno
  };
  enum class Path : std::uint8_t { kPlain, kFixedBuffer };

  UringRing() = default;
  UringRing(const UringRing&) = delete;
  UringRing& operator=(const UringRing&) = delete;
  ~UringRing() { close(); }

  /// Room for `in_flight` unfinished submissions. Checks that the kernel knows every operation used here and sends one no-op
  /// round. kUnavailable says what is missing.
  Status open(unsigned in_flight);
  /// REQUIRES: nothing is in flight. Releases registered files and memory before it returns.
  void close() noexcept;
  /// "single issuer", "cooperative" or "plain": the set-up that this kernel accepted.
  const char* mode() const noexcept { return mode_; }

  Status register_buffer(std::span<std::byte> buffer);
  Status register_fd(int fd);
  void unregister_fd(int fd) noexcept;

  // One entry each in the submission queue; sent by enter(). REQUIRES: fewer than `in_flight` are unfinished.
  Path prepare(const Transfer& transfer, std::uint64_t user_data) noexcept;
  void prepare_read(int fd, void* data, unsigned bytes, std::uint64_t user_data) noexcept;

  /// Sends what was prepared; `wait`: returns when there is something to reap. 0 or errno: what could not be sent stays
  /// prepared.
  int enter(bool wait) noexcept;
  bool has_prepared() const noexcept { return io_uring_sq_ready(&ring_) > 0; }
  /// user_data of what was prepared and that the kernel has not taken.
  std::vector<std::uint64_t> prepared() const;

  /// Completions, each seen once; valid until the next call.
  std::span<const Completion> reap() noexcept;

 private:
  Status set_up(unsigned in_flight);
  Status check_operations() noexcept;
  Status no_op_round() noexcept;
  io_uring_sqe* entry() noexcept;
  Status register_piece(std::byte* data, std::size_t bytes);
  int buffer_index(const std::byte* data, std::uint64_t bytes) const noexcept;  // -1: none holds it all

  struct Buffer {
    std::uintptr_t end;
    unsigned index;
  };

  io_uring ring_{};
  bool open_ = false, has_file_table_ = false, has_buffer_table_ = false;
  const char* mode_ = "closed";
  std::map<std::uintptr_t, Buffer> buffers_;  // by first byte, disjoint
  unsigned next_buffer_ = 0;
  std::unordered_map<int, unsigned> files_;  // fd -> place in the table
  std::vector<unsigned> free_files_;
  std::array<Completion, 64> reaped_{};
};

}  // namespace lmcn::io
