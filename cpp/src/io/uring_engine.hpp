// The io_uring engine: one thread owns the ring, submits, reaps and calls the sinks.
//
// Why one thread and no submitter lock: the kernel ties a request to the thread that submitted it. It completes the request in
// that thread's context (interrupting it, or waiting while it sits in a driver), and cancels what a kernel worker still holds
// when that thread ends. So submit() only queues and, when the ring thread sleeps, wakes it through an eventfd whose read is
// always armed in the same ring: a sleeping ring thread cannot miss new requests.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "io/io_engine.hpp"
#include "io/request_queue.hpp"
#include "io/transfer.hpp"
#include "io/uring_ring.hpp"

namespace lmcn::io {

/// When the ring itself fails (the process lost the right to call it), every request completes with that errno from then on.
class UringEngine final : public IoEngine {
 public:
  /// Sets up a ring and proves it with a no-op; kUnavailable says why there is none. REQUIRES: options were checked by
  /// make_engine(). `mode` (optional) receives the set-up that the kernel accepted.
  static Result<std::unique_ptr<IoEngine>> create(const EngineOptions& options, std::string* mode = nullptr);
  ~UringEngine() override;

  void submit(std::span<const IoRequest> requests) override;
  Status register_buffer(std::span<std::byte> buffer) override;
  Status register_fd(int fd) override;
  void unregister_fd(int fd) override;
  std::string name() const override { return "io_uring"; }

  /// Submissions to the kernel (a continued request counts again) from registered and from other memory; syncs are plain.
  std::uint64_t fixed_submissions() const noexcept { return fixed_submissions_.load(std::memory_order_relaxed); }
  std::uint64_t plain_submissions() const noexcept { return plain_submissions_.load(std::memory_order_relaxed); }

 private:
  struct Finished {
    IoResult result;
    CompletionSink* sink;
  };
  using Control = std::function<void()>;
  enum class Turn : std::uint8_t { kSleep, kWork, kLeave };

  explicit UringEngine(const EngineOptions& options);
  Status start();
  Status on_ring_thread(const std::function<Status()>& work);
  void wake() noexcept;

  // All below: ring thread only.
  void run();
  Turn take_work();
  void send_prepared();
  void disarm_wake();
  void prepare(std::size_t place);
  void exchange(bool wait);
  void take_answer(std::uint64_t place, std::int64_t answer);
  void deliver_one();
  void give_up(int error);
  void wait_without_ring();

  const unsigned depth_;
  std::mutex mutex_;  // guards queue_, controls_, sleeping_, stop_; never held during a system call or a sink
  RequestQueue queue_;
  std::deque<Control> controls_;
  bool sleeping_ = false;  // the ring thread waits, or has decided to: clear it and wake()
  bool stop_ = false;

  std::condition_variable wake_without_ring_;
  int wake_fd_ = -1;
  std::uint64_t wake_value_ = 0;  // target of the armed read
  bool wake_armed_ = false;
  UringRing ring_;
  int broken_ = 0;                   // errno that ended the use of the ring
  std::vector<Transfer> transfers_;  // by place
  std::vector<bool> used_;           // places under way
  std::vector<std::size_t> free_places_;
  std::deque<Finished> finished_;  // sinks to call
  std::atomic<std::uint64_t> fixed_submissions_{0}, plain_submissions_{0};
  std::thread thread_;
};

}  // namespace lmcn::io
