#include "host_registration.hpp"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <map>

#include "base/seq_points.hpp"
#include "copy/job_board.hpp"
#include "cuda_error.hpp"
#include "per_process.hpp"

namespace lmcn {
namespace {

constexpr std::uint64_t kPageBytes = 4096;
// Where somebody else registered an arena: how far apart it is asked whether that covers everything.
constexpr std::uint64_t kProbeBytes = std::uint64_t{2} << 20;

struct Shared {
  HostRegistration* registration = nullptr;
  std::uint64_t bytes = 0;
  std::size_t holders = 0;
};
struct AllShared {
  // Held also while a registration ends: who comes meanwhile must not find memory registered that is about to be unregistered.
  std::mutex mutex;
  std::map<std::byte*, Shared> by_base;
};

std::string gib(std::uint64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2f", static_cast<double>(bytes) / static_cast<double>(1 << 30));
  return text;
}

}  // namespace

std::shared_ptr<HostRegistration> HostRegistration::of(std::byte* base, std::uint64_t bytes, int device,
                                                       const HostRegistrationOptions& options) {
  const auto holding = [base](HostRegistration* registration) {
    return std::shared_ptr<HostRegistration>(registration, [base](HostRegistration* held) {
      AllShared& all = per_process<AllShared>();
      std::lock_guard lock(all.mutex);
      const auto found = all.by_base.find(base);
      if (found == all.by_base.end() || found->second.registration != held) {
        delete held;  // one that overlapped
        return;
      }
      if (--found->second.holders > 0) return;
      all.by_base.erase(found);
      delete held;
    });
  };
  AllShared& all = per_process<AllShared>();
  std::lock_guard lock(all.mutex);
  Status refused;
  for (auto& [other, entry] : all.by_base) {
    if (other == base && entry.bytes == bytes) {
      ++entry.holders;
      return holding(entry.registration);
    }
    if (base < other + entry.bytes && other < base + bytes) {
      refused = {Code::kInvalidArgument, "it overlaps another arena of this process that is registered"};
    }
  }
  auto* const made = new HostRegistration(base, bytes, device, options, refused);
  if (refused.ok()) all.by_base.emplace(base, Shared{made, bytes, 1});
  return holding(made);
}

HostRegistration::HostRegistration(std::byte* base, std::uint64_t bytes, int device, const HostRegistrationOptions& options,
                                   const Status& refused)
    : base_(base), bytes_(bytes), device_(device), failure_(refused) {
  const std::uint64_t unit = options.slot_bytes != 0 ? options.slot_bytes : kPageBytes;
  piece_bytes_ = std::max(options.piece_bytes / unit, std::uint64_t{1}) * unit;
  pieces_ = std::vector<Piece>((bytes + piece_bytes_ - 1) / piece_bytes_);
  if (!refused.ok()) return;
  running_ = static_cast<unsigned>(std::min<std::size_t>(std::max(options.threads, 1u), pieces_.size()));
  for (unsigned i = running_; i > 0; --i) threads_.emplace_back([this] { run(); });
}

HostRegistration::~HostRegistration() {
  stop_ = true;
  for (std::thread& thread : threads_) thread.join();
  const bool any = std::ranges::any_of(pieces_, [](const Piece& piece) { return piece.state == State::kMapped; });
  if (!any) return;
  // On a thread of its own, whose current device nobody misses. At teardown there is nobody to tell, and the driver may be gone.
  std::thread([this] {
    static_cast<void>(begin_cuda_thread(device_));
    for (std::size_t i = 0; i < pieces_.size(); ++i) {
      if (pieces_[i].state == State::kMapped) static_cast<void>(cudaHostUnregister(begin(i)));
    }
    static_cast<void>(cudaGetLastError());
  }).join();
}

std::uint64_t HostRegistration::length(std::size_t index) const noexcept {
  return std::min(piece_bytes_, bytes_ - index * piece_bytes_);
}

void HostRegistration::run() {
  Status status = begin_cuda_thread(device_);
  while (status.ok() && !stop_) {
    const std::size_t index = next_++;
    if (index >= pieces_.size()) break;
    LMCN_SEQ_POINT("registration.before_piece");
    status = register_piece(index);
  }
  {
    std::lock_guard lock(mutex_);
    if (!status.ok()) {
      stop_ = true;
      if (failure_.ok()) failure_ = status;
    }
    --running_;
  }
  ended_.notify_all();
}

Status HostRegistration::register_piece(std::size_t index) {
  const cudaError_t error = cudaHostRegister(begin(index), length(index), cudaHostRegisterPortable | cudaHostRegisterMapped);
  if (error == cudaErrorHostMemoryAlreadyRegistered) {
    static_cast<void>(cudaGetLastError());
    return map_piece(index, State::kFound);
  }
  LMCN_RETURN_IF_ERROR(cuda_check(error, "cudaHostRegister"));
  Status status = map_piece(index, State::kMapped);
  if (!status.ok()) static_cast<void>(cuda_check(cudaHostUnregister(begin(index)), "cudaHostUnregister"));
  return status;
}

// Registered by somebody else, in a way of theirs. Where addresses are unified all that is registered is mapped and portable,
// whatever was asked for.
Status HostRegistration::check_flags(std::byte* at) const {
  constexpr unsigned kWanted = cudaHostRegisterPortable | cudaHostRegisterMapped;
  constexpr unsigned kUnusable = cudaHostRegisterIoMemory | cudaHostRegisterReadOnly;
  unsigned flags = 0;
  LMCN_RETURN_IF_ERROR(cuda_check(cudaHostGetFlags(&flags, at), "cudaHostGetFlags"));
  int unified = 0;
  LMCN_RETURN_IF_ERROR(
      cuda_check(cudaDeviceGetAttribute(&unified, cudaDevAttrUnifiedAddressing, device_), "cudaDeviceGetAttribute"));
  if ((flags & kUnusable) == 0 && (unified != 0 || (flags & kWanted) == kWanted)) return {};
  return {Code::kUnsupported, "somebody else registered it with flags " + std::to_string(flags) + ", portable and mapped memory (" +
                                  std::to_string(kWanted) + ") is needed that is neither I/O memory nor read-only"};
}

// Perhaps only a part is registered, or ranges that the device sees apart from each other.
Status HostRegistration::map_piece(std::size_t index, State as) {
  void* device = nullptr;
  LMCN_RETURN_IF_ERROR(cuda_check(cudaHostGetDevicePointer(&device, begin(index), 0), "cudaHostGetDevicePointer"));
  if (as == State::kFound) {
    LMCN_RETURN_IF_ERROR(check_flags(begin(index)));
    const std::uint64_t last = length(index) - 1;
    for (std::uint64_t at = std::min(kProbeBytes, last);; at = std::min(at + kProbeBytes, last)) {
      void* there = nullptr;
      LMCN_RETURN_IF_ERROR(cuda_check(cudaHostGetDevicePointer(&there, begin(index) + at, 0), "cudaHostGetDevicePointer"));
      if (static_cast<std::byte*>(there) - static_cast<std::byte*>(device) != static_cast<std::ptrdiff_t>(at)) {
        return {Code::kUnsupported, "somebody else registered it in ranges that are not one for the device"};
      }
      LMCN_RETURN_IF_ERROR(check_flags(begin(index) + at));
      if (at == last) break;
    }
  }
  pieces_[index].device = static_cast<std::byte*>(device);
  pieces_[index].state.store(as, std::memory_order_release);
  return {};
}

std::byte* HostRegistration::device_address(const std::byte* address, std::uint64_t bytes) const noexcept {
  const auto offset = static_cast<std::uint64_t>(address - base_);
  const Piece& piece = pieces_[offset / piece_bytes_];
  const std::uint64_t in_piece = offset % piece_bytes_;
  if (piece.state.load(std::memory_order_acquire) == State::kPending || in_piece + bytes > piece_bytes_) return nullptr;
  return piece.device + in_piece;
}

std::int64_t HostRegistration::bytes_to_border(const std::byte* address) const noexcept {
  return static_cast<std::int64_t>(piece_bytes_ - static_cast<std::uint64_t>(address - base_) % piece_bytes_);
}

HostRegistration::Progress HostRegistration::progress() const {
  Progress progress;
  progress.bytes = bytes_;
  {
    std::lock_guard lock(mutex_);
    progress.ended = running_ == 0;
    progress.failure = failure_;
  }
  for (std::size_t i = 0; i < pieces_.size(); ++i) {
    const State state = pieces_[i].state.load(std::memory_order_acquire);
    if (state != State::kPending) progress.mapped_bytes += length(i);
    if (state == State::kFound) progress.found_bytes += length(i);
  }
  return progress;
}

std::string HostRegistration::describe() const {
  const Progress now = progress();
  std::string text = gib(now.mapped_bytes);
  if (now.mapped_bytes != now.bytes) text += " of " + gib(now.bytes);
  text += " GiB registered";
  if (!now.ended) text += " so far";
  if (now.found_bytes > 0) text += " (" + gib(now.found_bytes) + " by somebody else)";
  if (!now.failure.ok()) text += ", not the rest: " + now.failure.message();
  return text;
}

Status HostRegistration::wait_ended(std::chrono::milliseconds timeout) const {
  std::unique_lock lock(mutex_);
  if (ended_.wait_for(lock, std::min(timeout, kLongestWait), [&] { return running_ == 0; })) return {};
  return {Code::kDeadlineExceeded, "the arena is still being registered after " + std::to_string(timeout.count()) + " ms"};
}

}  // namespace lmcn
