#include "segment_verify.hpp"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "cuda_error.hpp"
#include "memory/slot_image.hpp"
#include "segment_verify.cuh"

namespace lmcn {
namespace {

static_assert(kVerifyHeaderBytes == kPageBytes && kMinSegmentBytes % 16 == 0);

constexpr std::size_t kMostImages = 65535;

/// Per image, in mapped host memory: filled here, then by the kernel.
struct alignas(64) ImageRecord {
  std::byte header[kPageBytes];
  std::uint32_t results[kMaxSegments];
};

Status out_of_bounds(const std::string& field, std::uint64_t value, const std::string& right) {
  return {Code::kInvalidArgument, field + " is " + std::to_string(value) + ", must be " + right};
}

Status corrupt(const DeviceImage& image, const std::string& what) {
  return {Code::kCorruption, what + " (key " + image.key.to_hex() + ")"};
}

/// What verify_slot() says, from the header's copy and the kernel's words.
Status judge(const DeviceImage& image, const ImageRecord& record) {
  LMCN_RETURN_IF_ERROR(check_header(record.header, image_bytes(image.payload_bytes)));
  const SlotHeader& header = *slot_header(record.header);
  if (header.payload_bytes != image.payload_bytes) {
    return corrupt(image, "slot header: payload_bytes is " + std::to_string(header.payload_bytes) + ", expected " +
                              std::to_string(image.payload_bytes));
  }
  if (header.key != image.key) return corrupt(image, "slot header: key is " + header.key.to_hex());
  if (header.ns != image.ns)
    return corrupt(image, "slot header: namespace is " + header.ns.to_hex() + ", expected " + image.ns.to_hex());
  for (std::uint32_t i = 0; i < header.segment_count; ++i) {
    if (record.results[i] == kSegmentMatches) continue;
    return corrupt(image, "slot payload: checksum of segment " + std::to_string(i) + " of " + std::to_string(header.segment_count) +
                              " does not match");
  }
  return {};
}

}  // namespace

/// One launch. Its memory is the device's from enqueue() until its event was reached.
struct SegmentVerifier::Batch {
  ~Batch() {
    // Nobody is left to tell of errors. Memory that a device may still write stays mapped.
    bool ended = !lost;
    if (event != nullptr) {
      ended = cudaEventSynchronize(event) == cudaSuccess && ended;
      static_cast<void>(cudaEventDestroy(event));
    }
    if (ended && host != nullptr) static_cast<void>(cudaFreeHost(host));
    static_cast<void>(cudaGetLastError());
  }

  Status create(std::size_t max_images) {
    const std::size_t tasks_bytes = (max_images * sizeof(VerifyTask) + 63) / 64 * 64;
    void *memory = nullptr, *on_device = nullptr;
    LMCN_RETURN_IF_ERROR(
        cuda_check(cudaHostAlloc(&memory, tasks_bytes + max_images * sizeof(ImageRecord), cudaHostAllocMapped), "cudaHostAlloc"));
    host = static_cast<std::byte*>(memory);
    LMCN_RETURN_IF_ERROR(cuda_check(cudaHostGetDevicePointer(&on_device, memory, 0), "cudaHostGetDevicePointer"));
    tasks = reinterpret_cast<VerifyTask*>(host);
    records = reinterpret_cast<ImageRecord*>(host + tasks_bytes);
    device_tasks = static_cast<VerifyTask*>(on_device);
    device_records = reinterpret_cast<ImageRecord*>(static_cast<std::byte*>(on_device) + tasks_bytes);
    return cuda_check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
  }

  std::byte* host = nullptr;
  VerifyTask *tasks = nullptr, *device_tasks = nullptr;  // the same bytes, by host and device addresses
  ImageRecord *records = nullptr, *device_records = nullptr;
  cudaEvent_t event = nullptr;
  std::vector<DeviceImage> images;
  bool lost = false;  // the device may use it for ever
};

SegmentVerifier::SegmentVerifier() = default;
SegmentVerifier::~SegmentVerifier() = default;

Result<std::unique_ptr<SegmentVerifier>> SegmentVerifier::make(int device, std::size_t max_images, std::size_t batches) {
  if (max_images == 0 || max_images > kMostImages) {
    return out_of_bounds("max_images", max_images, "in 1.." + std::to_string(kMostImages));
  }
  if (batches == 0) return out_of_bounds("batches", batches, "at least 1");
  std::unique_ptr<SegmentVerifier> made(new SegmentVerifier());
  made->max_images_ = max_images;
  DeviceGuard guard(device);
  LMCN_RETURN_IF_ERROR(guard.status());
  for (std::size_t i = 0; i < batches; ++i) {
    made->free_.push_back(std::make_unique<Batch>());
    LMCN_RETURN_IF_ERROR(made->free_.back()->create(max_images));
  }
  return made;
}

Status SegmentVerifier::fill(Batch& batch, std::span<const DeviceImage> images, unsigned& segments) const {
  for (std::size_t i = 0; i < images.size(); ++i) {
    const DeviceImage& image = images[i];
    const std::string at = "images[" + std::to_string(i) + "].";
    const auto address = reinterpret_cast<std::uintptr_t>(image.image);
    if (address == 0 || address % 16 != 0) return out_of_bounds(at + "image", address, "an address that is a multiple of 16");
    if (image.payload_bytes == 0 || image.payload_bytes > kMaxPayloadBytes) {
      return out_of_bounds(at + "payload_bytes", image.payload_bytes, "in 1.." + std::to_string(kMaxPayloadBytes));
    }
    const std::uint64_t segment_bytes = segment_bytes_for(image.payload_bytes);
    segments = std::max(segments, static_cast<unsigned>((image.payload_bytes + segment_bytes - 1) / segment_bytes));
    std::memset(batch.records[i].results, 0, sizeof batch.records[i].results);
    batch.tasks[i] = {.header = image.image,
                      .payload = image.image + kPageBytes,
                      .table = reinterpret_cast<const std::uint64_t*>(image.image + offsetof(SlotHeader, segment)),
                      .header_copy = batch.device_records[i].header,
                      .results = batch.device_records[i].results,
                      .payload_bytes = image.payload_bytes,
                      .segment_bytes = segment_bytes};
  }
  batch.images.assign(images.begin(), images.end());
  return {};
}

Result<std::uint64_t> SegmentVerifier::enqueue(std::span<const DeviceImage> images, cudaStream_t stream) {
  if (images.empty() || images.size() > max_images_) {
    return out_of_bounds("number of images", images.size(), "in 1.." + std::to_string(max_images_));
  }
  std::lock_guard lock(mutex_);
  if (free_.empty()) return Status(Code::kResourceExhausted, "every batch is under way, or waits to be asked for its outcome");
  Batch& batch = *free_.back();
  unsigned segments = 0;
  LMCN_RETURN_IF_ERROR(fill(batch, images, segments));
  const Status launched =
      cuda_check(enqueue_segment_verify(batch.device_tasks, static_cast<unsigned>(images.size()), segments, stream),
                 "launch of verify_segments");
  // Also when the launch failed: it may have begun.
  const Status recorded = cuda_check(cudaEventRecord(batch.event, stream), "cudaEventRecord");
  std::unique_ptr<Batch> taken = std::move(free_.back());
  free_.pop_back();
  taken->lost = !recorded.ok();
  const std::uint64_t ticket = next_ticket_++;
  under_way_.emplace(ticket, std::move(taken));
  LMCN_RETURN_IF_ERROR(launched);
  LMCN_RETURN_IF_ERROR(recorded);
  return ticket;
}

Result<bool> SegmentVerifier::outcome(std::uint64_t ticket, std::vector<Status>& outcome) {
  std::unique_ptr<Batch> batch;
  {
    std::lock_guard lock(mutex_);
    const auto found = under_way_.find(ticket);
    if (found == under_way_.end()) return Status(Code::kNotFound, "no batch has the ticket " + std::to_string(ticket));
    const cudaError_t error = cudaEventQuery(found->second->event);
    if (error == cudaErrorNotReady) {
      static_cast<void>(cudaGetLastError());
      return false;
    }
    batch = std::move(found->second);
    under_way_.erase(found);
    if (Status status = cuda_check(error, "cudaEventQuery"); !status.ok()) {
      batch->lost = true;
      return status;
    }
  }
  outcome.clear();
  for (std::size_t i = 0; i < batch->images.size(); ++i) outcome.push_back(judge(batch->images[i], batch->records[i]));
  std::lock_guard lock(mutex_);
  free_.push_back(std::move(batch));
  return true;
}

}  // namespace lmcn
