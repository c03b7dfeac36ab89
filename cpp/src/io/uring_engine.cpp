#include "io/uring_engine.hpp"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <future>
#include <numeric>
#include <system_error>

#include "io/engine_thread.hpp"

namespace lmcn::io {
namespace {

constexpr std::uint64_t kWakeUserData = ~0ull;  // all others are places in transfers_
constexpr auto kNap = std::chrono::milliseconds(1);
constexpr auto kLastAnswersWithin = std::chrono::seconds(5);

bool passes(int error) {
  return error == EINTR || error == EAGAIN || error == EBUSY || error == ENOMEM;
}

}  // namespace

UringEngine::UringEngine(const EngineOptions& options)
    : depth_(options.queue_depth), queue_(options.queue_depth), transfers_(depth_), used_(depth_), free_places_(depth_) {
  std::iota(free_places_.rbegin(), free_places_.rend(), std::size_t{0});
}

Result<std::unique_ptr<IoEngine>> UringEngine::create(const EngineOptions& options, std::string* mode) {
  std::unique_ptr<UringEngine> engine(new UringEngine(options));
  LMCN_RETURN_IF_ERROR(engine->start());
  if (mode != nullptr) *mode = engine->ring_.mode();
  return std::unique_ptr<IoEngine>(std::move(engine));
}

Status UringEngine::start() {
  wake_fd_ = ::eventfd(0, EFD_CLOEXEC);
  if (wake_fd_ < 0) return Status::from_errno(errno, "eventfd", Code::kResourceExhausted);
  std::promise<Status> promise;
  std::future<Status> opened = promise.get_future();
  try {
    thread_ = start_engine_thread("lmcn-io-uring", [this, promise = std::move(promise)]() mutable {
      Status status = ring_.open(depth_ + 1);  // + 1: the armed read of wake_fd_
      const bool ok = status.ok();
      promise.set_value(std::move(status));
      if (ok) run();
      ring_.close();
    });
  } catch (const std::system_error& error) {
    return Status(Code::kResourceExhausted, std::string("io_uring thread: ") + error.what(), error.code().value());
  }
  return opened.get();
}

UringEngine::~UringEngine() {
  bool asleep = false;
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
    asleep = std::exchange(sleeping_, false);
  }
  if (asleep) wake();
  if (thread_.joinable()) thread_.join();
  if (wake_fd_ >= 0) ::close(wake_fd_);
}

void UringEngine::wake() noexcept {
  const std::uint64_t one = 1;
  while (::write(wake_fd_, &one, sizeof one) < 0 && errno == EINTR) {
  }
  wake_without_ring_.notify_one();
}

void UringEngine::submit(std::span<const IoRequest> requests) {
  bool asleep = false;
  {
    const std::lock_guard lock(mutex_);
    queue_.push(requests);
    if (queue_.can_start()) asleep = std::exchange(sleeping_, false);  // else a completion will wake it
  }
  if (asleep) wake();
}

Status UringEngine::on_ring_thread(const std::function<Status()>& work) {
  const auto guarded = [&] {
    return broken_ == 0 ? work() : Status::from_errno(broken_, "io_uring of this engine failed", Code::kUnavailable);
  };
  if (std::this_thread::get_id() == thread_.get_id()) return guarded();
  const auto promise = std::make_shared<std::promise<Status>>();
  std::future<Status> done = promise->get_future();
  bool asleep = false;
  {
    const std::lock_guard lock(mutex_);
    controls_.push_back([&guarded, promise] { promise->set_value(guarded()); });
    asleep = std::exchange(sleeping_, false);
  }
  if (asleep) wake();
  return done.get();
}

Status UringEngine::register_buffer(std::span<std::byte> buffer) {
  return on_ring_thread([&] { return ring_.register_buffer(buffer); });
}

Status UringEngine::register_fd(int fd) {
  return on_ring_thread([&] { return ring_.register_fd(fd); });
}

void UringEngine::unregister_fd(int fd) {
  (void)on_ring_thread([&] {
    ring_.unregister_fd(fd);
    return Status();
  });
}

// One sink call per turn, and the ring is served between them, so that the device has work while sinks run.
void UringEngine::run() {
  for (Turn turn = take_work(); turn != Turn::kLeave; turn = take_work()) {
    if (broken_ == 0) {
      exchange(turn == Turn::kSleep);
    } else if (turn == Turn::kSleep) {
      wait_without_ring();
    }
    deliver_one();
  }
  disarm_wake();
}

// Moves what may start to the ring, and decides under the same lock whether this turn sleeps: a request is either seen here or
// its submitter sees sleeping_.
UringEngine::Turn UringEngine::take_work() {
  std::deque<Control> controls;
  std::vector<std::size_t> started;
  Turn turn = Turn::kWork;
  {
    const std::lock_guard lock(mutex_);
    controls.swap(controls_);
    IoRequest request;
    const int refuse = broken_ != 0 ? broken_ : stop_ ? ECANCELED : 0;
    while (refuse != 0 && queue_.cancel(request)) finished_.push_back({unstarted_result(request, refuse), request.sink});
    while (queue_.start(request)) {
      const std::size_t place = free_places_.back();
      free_places_.pop_back();
      transfers_[place] = Transfer(request);
      started.push_back(place);
    }
    if (controls.empty() && finished_.empty()) turn = stop_ && queue_.in_flight() == 0 ? Turn::kLeave : Turn::kSleep;
    sleeping_ = turn == Turn::kSleep;
  }
  if (!controls.empty()) send_prepared();
  for (const Control& control : controls) control();
  for (const std::size_t place : started) {
    used_[place] = true;
    broken_ == 0 ? prepare(place) : take_answer(place, -broken_);
  }
  if (turn != Turn::kLeave && !wake_armed_ && broken_ == 0) {
    ring_.prepare_read(wake_fd_, &wake_value_, sizeof wake_value_, kWakeUserData);
    wake_armed_ = true;
  }
  return turn;
}

// What is prepared may name a registered file that the next control removes.
void UringEngine::send_prepared() {
  while (broken_ == 0 && ring_.has_prepared()) exchange(false);
}

// The kernel must not write wake_value_ after it is gone.
void UringEngine::disarm_wake() {
  if (wake_armed_) wake();
  while (wake_armed_ && broken_ == 0) exchange(true);
}

void UringEngine::prepare(std::size_t place) {
  const bool fixed = ring_.prepare(transfers_[place], place) == UringRing::Path::kFixedBuffer;
  (fixed ? fixed_submissions_ : plain_submissions_).fetch_add(1, std::memory_order_relaxed);
}

void UringEngine::exchange(bool wait) {
  const int error = ring_.enter(wait);
  for (;;) {
    const std::span<const UringRing::Completion> completions = ring_.reap();
    if (completions.empty()) break;
    for (const UringRing::Completion& completion : completions) take_answer(completion.user_data, completion.answer);
  }
  if (error == 0 || error == EINTR) return;
  if (!passes(error)) return give_up(error);
  if (finished_.empty()) std::this_thread::sleep_for(kNap);  // the kernel is short of memory: all stays prepared, try again
}

void UringEngine::take_answer(std::uint64_t place, std::int64_t answer) {
  if (place == kWakeUserData) {
    wake_armed_ = false;
    return;
  }
  Transfer& transfer = transfers_[place];
  if (!transfer.advance(answer)) {
    if (broken_ == 0) return prepare(place);
    transfer.fail(broken_);
  }
  finished_.push_back({transfer.result(), transfer.request().sink});
  used_[place] = false;
  free_places_.push_back(place);
  const std::lock_guard lock(mutex_);
  queue_.finish();
  sleeping_ = false;  // spares submitters the wake-up
}

void UringEngine::deliver_one() {
  if (finished_.empty()) return;
  const Finished next = finished_.front();
  finished_.pop_front();
  next.sink->on_io(next.result);
}

// The ring cannot be entered any more. What the kernel never took fails now; for what it has, answers may still arrive in the
// shared queue and memory is theirs until then, so they get time to, and only then count as failed.
void UringEngine::give_up(int error) {
  broken_ = error;
  for (const std::uint64_t place : ring_.prepared()) take_answer(place, -error);
  const auto in_kernel = [this] { return std::find(used_.begin(), used_.end(), true) != used_.end(); };
  const auto until = std::chrono::steady_clock::now() + kLastAnswersWithin;
  while (in_kernel() && std::chrono::steady_clock::now() < until) {
    for (const UringRing::Completion& completion : ring_.reap()) take_answer(completion.user_data, completion.answer);
    std::this_thread::sleep_for(kNap);
  }
  for (std::size_t place = 0; place < used_.size(); ++place) {
    if (used_[place]) take_answer(place, -error);
  }
}

void UringEngine::wait_without_ring() {
  std::unique_lock lock(mutex_);
  wake_without_ring_.wait(lock, [this] { return !sleeping_; });
}

}  // namespace lmcn::io
