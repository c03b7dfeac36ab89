// The I/O that a log has under way, and for how long the device has owed an answer.
#pragma once

#include <array>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <mutex>

#include "io/io_engine.hpp"

namespace lmcn::nvme {

/// Thread-safe.
class InFlight {
 public:
  using Clock = std::chrono::steady_clock;
  /// The engine starts reads before writes, and each kind in the order of submission. kDirect: system calls of the log itself,
  /// which wait in no queue.
  enum class Lane : std::uint8_t { kRead, kWrite, kSync, kDirect };
  static Lane lane_of(io::Op op) noexcept {
    return op == io::Op::kRead ? Lane::kRead : op == io::Op::kWrite ? Lane::kWrite : Lane::kSync;
  }
  struct Ticket {
    Lane lane;
    std::uint64_t id;
  };

  Ticket enter(Lane lane, Clock::time_point now = Clock::now());
  void leave(Ticket ticket, Clock::time_point now = Clock::now());
  void wait_zero();

  /// For how long one of them has certainly been at the device without an answer. I/O that may still wait behind other I/O in
  /// the engine's queue does not count: a slow device under a long queue is not a silent one. Since
  ///   reads:   the last read that ended; or a later read ended, so it was started before;
  ///   writes:  the last read, write or sync that ended; or a later write ended;
  ///   syncs and direct calls, which take the longer the more there is to write: the last read, write or sync that ended.
  /// What was begun longer than `patience` ago counts since then, whatever else ended: one I/O may be lost on a device that
  /// answers all others.
  Clock::duration silence(Clock::time_point now = Clock::now(), Clock::duration patience = Clock::duration::max()) const;

  /// What happened until now was perhaps not seen (this process was stopped): counts as if everything had answered.
  void excuse(Clock::time_point now = Clock::now());

  /// One synchronous operation. `in_flight` may be null.
  class Scope {
   public:
    Scope(InFlight* in_flight, Lane lane) : in_flight_(in_flight) {
      if (in_flight_ != nullptr) ticket_ = in_flight_->enter(lane);
    }
    ~Scope() {
      if (in_flight_ != nullptr) in_flight_->leave(ticket_);
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    InFlight* in_flight_;
    Ticket ticket_{};
  };

 private:
  struct Operation {
    Clock::time_point begun;
    Clock::time_point overtaken;  // when a later one of its lane ended; max(): not yet
  };
  using Operations = std::map<std::uint64_t, Operation>;  // in the order of submission; the overtaken ones come first

  Operations& of(Lane lane) { return operations_[static_cast<std::size_t>(lane)]; }
  const Operations& of(Lane lane) const { return operations_[static_cast<std::size_t>(lane)]; }

  mutable std::mutex mutex_;
  std::condition_variable zero_;
  std::uint64_t next_id_ = 0;
  std::array<Operations, 4> operations_;
  Clock::time_point last_read_{}, last_any_{};  // ends of I/O through the engine
};

}  // namespace lmcn::nvme
