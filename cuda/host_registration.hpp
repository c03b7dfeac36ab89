// Makes an arena known to CUDA (page-locked and mapped), in the background and in pieces, while copies already run.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "lmcn/status.hpp"

namespace lmcn {

struct HostRegistrationOptions {
  /// A driver may hold other calls of this process while it registers, so one call is kept short.
  std::uint64_t piece_bytes = std::uint64_t{256} << 20;
  /// Distance of slots in the arena, so that borders of pieces fall between them. 0: not known.
  std::uint64_t slot_bytes = 0;
  unsigned threads = 4;
};

/// Thread-safe; the questions never wait. Pieces that could not be registered stay ordinary memory for good: after the first
/// failure no more is tried. What somebody else has registered is used where it is mapped for this device and portable.
class HostRegistration {
 public:
  /// The registration of an arena, begun if nobody in this process has it yet, shared if somebody has (`options` are then theirs).
  /// It ends, also while registering, with the last holder, who must have ended every copy and kernel. `base`: 4 KiB-aligned; the
  /// memory outlives the registration. An arena that overlaps another one's registration is not registered.
  static std::shared_ptr<HostRegistration> of(std::byte* base, std::uint64_t bytes, int device,
                                              const HostRegistrationOptions& options = {});
  HostRegistration(const HostRegistration&) = delete;
  HostRegistration& operator=(const HostRegistration&) = delete;

  /// Where the device sees [address, address + bytes), if CUDA maps all of it as one range now; else nullptr.
  std::byte* device_address(const std::byte* address, std::uint64_t bytes) const noexcept;
  /// From `address` to the end of its piece. REQUIRES: `address` lies in the arena.
  std::int64_t bytes_to_border(const std::byte* address) const noexcept;

  struct Progress {
    std::uint64_t bytes = 0;         // of the arena
    std::uint64_t mapped_bytes = 0;  // that copies of any path may use
    std::uint64_t found_bytes = 0;   // of these: somebody else had registered them, and will unregister them
    bool ended = false;              // nothing more will be registered
    Status failure;                  // the first
  };
  Progress progress() const;
  /// "8.00 GiB registered", "1.25 of 8.00 GiB registered so far", "0.50 of 8.00 GiB registered, then cudaHostRegister: ..."
  std::string describe() const;
  /// kDeadlineExceeded: still registering.
  Status wait_ended(std::chrono::milliseconds timeout) const;

 private:
  enum class State : unsigned char { kPending, kMapped, kFound };
  struct Piece {
    std::atomic<State> state{State::kPending};
    std::byte* device = nullptr;  // written before `state`
  };

  HostRegistration(std::byte* base, std::uint64_t bytes, int device, const HostRegistrationOptions& options, const Status& refused);
  ~HostRegistration();
  void run();
  Status register_piece(std::size_t index);
  Status map_piece(std::size_t index, State as);
  Status check_flags(std::byte* at) const;
  std::uint64_t length(std::size_t index) const noexcept;
  std::byte* begin(std::size_t index) const noexcept { return base_ + index * piece_bytes_; }

  std::byte* const base_;
  const std::uint64_t bytes_;
  const int device_;
  std::uint64_t piece_bytes_;
  std::vector<Piece> pieces_;
  std::atomic<std::size_t> next_{0};
  std::atomic<bool> stop_{false};

  mutable std::mutex mutex_;
  mutable std::condition_variable ended_;
  unsigned running_ = 0;
  Status failure_;
  std::vector<std::thread> threads_;
};

}  // namespace lmcn
