// One started request: what to ask the kernel next, and what its answers add up to. The only place that judges short I/O
// while it happens; IoResult::status() judges the sum.
#pragma once

#include <algorithm>
#include <cerrno>
#include <cstdint>

#include "io/io_engine.hpp"

namespace lmcn::io {

/// Invariants: bytes [0, done_) of the request have moved; resume_ <= done_ and is a multiple of kAlignment, so that a
/// continuation is valid for O_DIRECT even when the device stopped inside a block (the part of that block moves twice).
class Transfer {
 public:
  static constexpr std::uint64_t kAlignment = 4096;
  static constexpr std::uint64_t kMaxPieceBytes = 1ull << 30;  // the kernel moves < 2 GiB at once
  static constexpr unsigned kMaxFruitless = 1000;              // EINTR or EAGAIN in a row

  Transfer() = default;
  explicit Transfer(const IoRequest& request) noexcept : request_(request) {}

  const IoRequest& request() const noexcept { return request_; }

  // The piece to ask for next.
  std::byte* data() const noexcept { return request_.data + resume_; }
  std::uint64_t offset() const noexcept { return request_.offset + resume_; }
  unsigned bytes() const noexcept { return static_cast<unsigned>(std::min(request_.bytes - resume_, kMaxPieceBytes)); }
  bool interrupted() const noexcept { return fruitless_ > 0; }

  /// Takes the kernel's answer to that piece: bytes moved, or -errno. true: the request is over and result() final.
  bool advance(std::int64_t answer) noexcept {
    if ((answer == -EINTR || answer == -EAGAIN) && ++fruitless_ <= kMaxFruitless) return false;
    if (answer < 0) {
      error_ = static_cast<int>(-answer);
      return true;
    }
    if (request_.op == Op::kSync) return true;
    const std::uint64_t reached = resume_ + static_cast<std::uint64_t>(answer);
    if (reached <= done_) return true;  // end of file, or a device that stopped
    done_ = reached;
    resume_ = done_ / kAlignment * kAlignment;
    fruitless_ = 0;
    return done_ >= request_.bytes;
  }

  /// Ends it with `error` when no further answer will come.
  void fail(int error) noexcept { error_ = error; }

  IoResult result() const noexcept { return {request_.tag, request_.op == Op::kSync ? 0 : request_.bytes, done_, error_}; }

 private:
  IoRequest request_;
  std::uint64_t done_ = 0, resume_ = 0;
  unsigned fruitless_ = 0;
  int error_ = 0;
};

/// The result of a request that never started.
inline IoResult unstarted_result(const IoRequest& request, int error) noexcept {
  Transfer transfer(request);
  transfer.fail(error);
  return transfer.result();
}

}  // namespace lmcn::io
