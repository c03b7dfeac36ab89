#include "plan_ring.hpp"

#include "cuda_error.hpp"

namespace lmcn {
namespace {

constexpr std::size_t aligned(std::size_t bytes) {
  return (bytes + 63) / 64 * 64;
}

}  // namespace

PlanRing::~PlanRing() {
  // Nobody is left to tell of errors. Memory that a device may still read stays mapped.
  bool ended = true;
  for (const Launch& launch : launches_) {
    ended = launch.failure.ok() && cudaEventSynchronize(launch.event) == cudaSuccess && ended;
    static_cast<void>(cudaEventDestroy(launch.event));
  }
  for (cudaEvent_t event : free_events_) static_cast<void>(cudaEventDestroy(event));
  if (ended && host_ != nullptr) static_cast<void>(cudaFreeHost(host_));
  static_cast<void>(cudaGetLastError());
}

Status PlanRing::create(std::size_t bytes) {
  void* host = nullptr;
  void* device = nullptr;
  bytes_ = aligned(bytes);
  LMCN_RETURN_IF_ERROR(cuda_check(cudaHostAlloc(&host, bytes_, cudaHostAllocMapped), "cudaHostAlloc"));
  host_ = static_cast<std::byte*>(host);
  LMCN_RETURN_IF_ERROR(cuda_check(cudaHostGetDevicePointer(&device, host, 0), "cudaHostGetDevicePointer"));
  device_ = static_cast<const std::byte*>(device);
  return {};
}

// Where `bytes` fit behind the newest slice and before the oldest. Slices never meet head to tail over the end of the memory.
bool PlanRing::place(std::size_t bytes, std::size_t& begin) const {
  begin = 0;
  if (launches_.empty()) return bytes <= bytes_;
  const std::size_t oldest = launches_.front().begin, newest_end = launches_.back().end;
  if (newest_end <= oldest) {
    begin = newest_end;
    return bytes <= oldest - newest_end;
  }
  if (bytes <= bytes_ - newest_end) {
    begin = newest_end;
    return true;
  }
  return bytes <= oldest;
}

Status PlanRing::retire(bool wait) {
  while (!launches_.empty()) {
    const cudaEvent_t event = launches_.front().event;
    if (!launches_.front().failure.ok()) return wait ? launches_.front().failure : Status();
    const cudaError_t error = wait ? cudaEventSynchronize(event) : cudaEventQuery(event);
    if (error == cudaErrorNotReady) {
      static_cast<void>(cudaGetLastError());
      return {};
    }
    LMCN_RETURN_IF_ERROR(cuda_check(error, wait ? "cudaEventSynchronize" : "cudaEventQuery"));
    free_events_.push_back(event);
    launches_.pop_front();
    wait = false;
  }
  return {};
}

Status PlanRing::take(std::size_t bytes, Slice& slice) {
  LMCN_RETURN_IF_ERROR(retire(false));
  taken_bytes_ = aligned(bytes);
  while (!place(taken_bytes_, taken_begin_)) LMCN_RETURN_IF_ERROR(retire(true));
  if (free_events_.empty()) {
    cudaEvent_t event = nullptr;
    LMCN_RETURN_IF_ERROR(cuda_check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags"));
    free_events_.push_back(event);
  }
  slice = {host_ + taken_begin_, device_ + taken_begin_};
  return {};
}

Status PlanRing::keep(cudaStream_t stream) {
  const cudaEvent_t event = free_events_.back();
  free_events_.pop_back();
  const Status recorded = cuda_check(cudaEventRecord(event, stream), "cudaEventRecord");
  launches_.push_back({taken_begin_, taken_begin_ + taken_bytes_, event, stream, recorded});
  return recorded;
}

void PlanRing::drained(cudaStream_t stream) {
  std::erase_if(launches_, [stream](const Launch& launch) {
    if (launch.stream != stream) return false;
    // Nobody waits for it any more, and nobody is left to tell of an error.
    if (cudaEventDestroy(launch.event) != cudaSuccess) static_cast<void>(cudaGetLastError());
    return true;
  });
}

}  // namespace lmcn
