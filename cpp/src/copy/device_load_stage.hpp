// Staging memory of a DeviceLoader and what is done with a record in it. One lane per record in flight, each with a fixed part of
// the staging memory; a lane is used by one thread.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "copy/copy_geometry.hpp"
#include "lmcn/paged_copy.hpp"
#include "lmcn/status.hpp"

namespace lmcn {

/// A run of whole segments of a payload (the payload's last may be shorter) at the start of a lane's memory.
struct StagedSegments {
  std::uint64_t bytes = 0;
  std::uint32_t segment_bytes = 0;
  std::uint32_t first = 0;                   // number of the first one in the payload, for messages
  std::span<const std::uint64_t> checksums;  // XXH3-64 of each
};

/// What verify() says of number `segment` of the payload.
inline Status segment_differs(std::uint64_t segment) {
  return {Code::kCorruption, "checksum of segment " + std::to_string(segment) + " does not match"};
}

/// A point on the engine's stream.
class StreamMark {
 public:
  virtual ~StreamMark() = default;
};

class DeviceStageLane {
 public:
  virtual ~DeviceStageLane() = default;
  /// Makes the device usable on this thread. Before anything else, on the lane's thread.
  virtual Status attach() = 0;
  /// The lane's part of the staging memory; a multiple of 16, in host memory of 4096.
  virtual std::byte* memory() noexcept = 0;
  /// Since a call failed: something may still read or write memory() and nobody can tell when it ends. Nothing may be put there any
  /// more. While this is false, whatever a call began has ended when the call returns, failed or not.
  virtual bool broken() const noexcept = 0;
  /// kUnavailable: what a call that failed began may still run, and write whatever it was told to, for all that can be known. ok:
  /// it has ended, or the device is lost and runs nothing.
  virtual Status stranded() const = 0;
  /// Host memory of the same size, 4096-aligned, that upload() takes to memory(); the same memory where that is the host's.
  virtual Result<std::byte*> host_memory() = 0;
  /// Copies the first `bytes` of host_memory() to memory(); waits.
  virtual Status upload(std::uint64_t bytes) = 0;
  /// The other direction.
  virtual Status download(std::uint64_t bytes) = 0;
  /// kCorruption: the first segment whose checksum differs. Any other code: it could not be told. Waits.
  virtual Status verify(const StagedSegments& segments) = 0;
  /// Copies job.items[item] from the rank's part at memory() + rank_part to its pages, after `mark`; waits. REQUIRES: `job` passed
  /// check_job() of the stage's geometry.
  virtual Status scatter(const CopyJob& job, std::uint32_t item, std::uint64_t rank_part, const StreamMark* mark) = 0;
};

class DeviceStage {
 public:
  virtual ~DeviceStage() = default;
  /// All lanes' memory, one allocation.
  virtual std::byte* base() noexcept = 0;
  virtual std::uint64_t bytes() const noexcept = 0;
  virtual std::unique_ptr<DeviceStageLane> make_lane(unsigned index) = 0;
  /// Runs `work` on this thread with the device current; cuFile registers memory and files in the current context. `work` does not
  /// run when the device cannot be made so.
  virtual Status on_device(const std::function<Status()>& work) = 0;
  /// Enqueues a mark; waits for nothing. Null where there are no streams.
  virtual Result<std::shared_ptr<const StreamMark>> mark(std::uint64_t stream) = 0;
};

struct StageOptions {
  std::uint64_t lane_bytes = 0;  // a multiple of 4096
  unsigned lanes = 0;
  std::chrono::milliseconds lost_after{30'000};  // as DeviceLoaderOptions::lost_after
};

/// `geometry` may be null where nothing is scattered; it outlives the stage.
Result<std::unique_ptr<DeviceStage>> make_host_stage(const CopyGeometry* geometry, const StageOptions& options);
/// kUnavailable: built without CUDA, no driver, no device.
Result<std::unique_ptr<DeviceStage>> make_cuda_stage(const CopyGeometry* geometry, const PagedKvLayout* paged,
                                                     const StageOptions& options, int device);
/// That of `device`, or the host's for -1.
Result<std::unique_ptr<DeviceStage>> make_stage(const CopyGeometry* geometry, const PagedKvLayout* paged,
                                                const StageOptions& options, int device);

}  // namespace lmcn
