// An IoEngine that fails on request. Test support: it lives here because the tests of several rooms use it.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <vector>

#include "io/io_engine.hpp"

namespace lmcn::io {

/// One line of the script: which requests, and what happens to them.
///   faulty.add(Fault::fail_with(EIO).on(Op::kWrite).only(3));
///   faulty.add(Fault::flip_bit(5000).in_range(0, 1 << 20));
struct Fault {
  enum class Kind : std::uint8_t { kShort, kError, kFlipBit, kTornWrite, kHold, kDrop };

  /// Reads and writes end `missing` bytes early with error 0: memory after the end of a read is as before, a write's last
  /// bytes do not reach the file.
  static Fault short_by(std::uint64_t missing) { return {.kind = Kind::kShort, .bytes = missing}; }
  /// Does not reach the device; completes with errno `error`.
  static Fault fail_with(int error) { return {.kind = Kind::kError, .error = error}; }
  /// Reads only: the byte at `position` of what was read is XORed with `mask`; reported as good.
  static Fault flip_bit(std::uint64_t position, unsigned char mask = 1) {
    return {.kind = Kind::kFlipBit, .bytes = position, .mask = mask};
  }
  /// Writes only: the first `bytes` reach the file; reported as good.
  static Fault torn_after(std::uint64_t bytes) { return {.kind = Kind::kTornWrite, .bytes = bytes}; }
  /// Waits before the device until release().
  static Fault hold() { return {.kind = Kind::kHold}; }
  /// Is done by the device, but its completion is lost until release().
  static Fault drop() { return {.kind = Kind::kDrop}; }

  // Which requests: all conditions must hold. Default: every one that the kind applies to.
  Fault on(Op which) const {
    return with([&](Fault& f) { f.op = which; });
  }
  Fault of_fd(int which) const {
    return with([&](Fault& f) { f.fd = which; });
  }
  /// Requests that touch [begin, end) of the file; never a sync.
  Fault in_range(std::uint64_t begin, std::uint64_t end) const {
    return with([&](Fault& f) { f.range_begin = begin, f.range_end = end, f.ranged = true; });
  }
  /// Only the nth of them since add(), counted from 1.
  Fault only(std::uint64_t n) const {
    return with([&](Fault& f) { f.nth = n; });
  }
  /// Every nth of them.
  Fault each(std::uint64_t n) const {
    return with([&](Fault& f) { f.every = n; });
  }

  Kind kind = Kind::kError;
  std::uint64_t bytes = 0;
  int error = 0;
  unsigned char mask = 0;
  std::optional<Op> op{};
  std::optional<int> fd{};
  bool ranged = false;
  std::uint64_t range_begin = 0, range_end = 0;
  std::uint64_t nth = 0, every = 1;

 private:
  template <class Change>
  Fault with(Change&& change) const {
    Fault copy = *this;
    change(copy);
    return copy;
  }
};

/// What was done so far, each counted when it took effect (before the sink heard of it).
struct FaultCounts {
  std::uint64_t requests = 0;  // seen by submit(), whatever became of them
  std::uint64_t shortened = 0, failed = 0, flipped = 0, torn = 0, held = 0, dropped = 0;
};

/// Thread-safe; the script may change while requests run. Of the faults that match a request the first added one applies; all
/// that match count it. Torn and short writes write a copy whose last 4 KiB block is completed from the file (zeros where it
/// ends or cannot be read), so they work on O_DIRECT descriptors at any byte.
/// Destruction ends what is held with ECANCELED and delivers what was dropped.
class FaultyEngine final : public IoEngine, private CompletionSink {
 public:
  using FaultId = std::uint64_t;

  explicit FaultyEngine(std::unique_ptr<IoEngine> inner);
  ~FaultyEngine() override;

  FaultId add(const Fault& fault);
  /// Requests that are held or dropped already stay so.
  void remove(FaultId id);
  void clear();

  /// How many are held or dropped now.
  std::size_t withheld() const;
  /// Waits until withheld() >= count. false: not within `timeout`.
  bool wait_withheld(std::size_t count, std::chrono::milliseconds timeout = std::chrono::seconds(30)) const;
  /// Lets the oldest `count` go on, in the order in which they came; with `error` != 0 they end with that errno instead.
  /// Returns how many there were. The completions come on an engine thread.
  std::size_t release(std::size_t count = std::numeric_limits<std::size_t>::max(), int error = 0);

  FaultCounts counts() const;

  void submit(std::span<const IoRequest> requests) override;
  Status register_buffer(std::span<std::byte> buffer) override { return inner_->register_buffer(buffer); }
  Status register_fd(int fd) override { return inner_->register_fd(fd); }
  void unregister_fd(int fd) override { inner_->unregister_fd(fd); }
  std::string name() const override { return "faulty(" + inner_->name() + ")"; }
  IoEngine& inner() noexcept { return *inner_; }

 private:
  struct Flight;
  struct Rule {
    Fault fault;
    std::uint64_t matches = 0;
  };
  struct Withheld {
    IoRequest request;
    std::optional<IoResult> result;  // what a dropped request came to
  };

  void on_io(const IoResult& result) noexcept override;
  std::optional<Fault> fault_for(const IoRequest& request);
  std::optional<IoRequest> altered(const IoRequest& request, const Fault& fault);
  IoRequest carrier(const IoRequest& request, const IoResult& result);
  IoRequest resumed(const Withheld& waiting, int error);

  IoEngine* const inner_;  // owned; a plain pointer because sinks may submit while it is being destroyed
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  std::map<FaultId, Rule> rules_;
  FaultId next_id_ = 1;
  std::deque<Withheld> withheld_;
  FaultCounts counts_;
  bool closing_ = false;
};

}  // namespace lmcn::io
