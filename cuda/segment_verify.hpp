// "Verify or miss" for slot images that are in the device's memory already (read from NVMe without passing through the host): the
// checksums are taken there, and only headers and one word per segment come back.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <unordered_map>
#include <vector>

#include "lmcn/key.hpp"
#include "lmcn/status.hpp"

namespace lmcn {

/// A slot image (memory/slot_image.hpp) and what it must be of.
struct DeviceImage {
  const std::byte* image = nullptr;  // valid on the device, a multiple of 16; image_bytes(payload_bytes) long
  std::uint64_t payload_bytes = 0;   // as its header must say
  ChunkKey key;
  NamespaceId ns;
};

/// Thread-safe. Never waits for the device, but in the destructor.
class SegmentVerifier {
 public:
  /// Room for `batches` batches under way, each of at most `max_images` images (about 6 KiB of pinned memory per image).
  static Result<std::unique_ptr<SegmentVerifier>> make(int device, std::size_t max_images, std::size_t batches);
  ~SegmentVerifier();  // waits for what was enqueued
  SegmentVerifier(const SegmentVerifier&) = delete;
  SegmentVerifier& operator=(const SegmentVerifier&) = delete;

  /// Enqueues the check of `images` on `stream` and returns its ticket. The images are at rest from when `stream` gets there until
  /// outcome() has answered. REQUIRES: the device is current on this thread and `stream` is one of its streams.
  /// kInvalidArgument: no image or too many; an address or a payload's length is out of bounds. kResourceExhausted: every batch is
  /// under way, or waits to be asked for. kIoError: CUDA's; nothing is known of the images, and the batch is not used again.
  Result<std::uint64_t> enqueue(std::span<const DeviceImage> images, cudaStream_t stream);

  /// false: not known yet. true: `outcome` has what verify_slot() would say of each image, and the ticket is used up; so it is
  /// after kIoError, when nothing is known of the images. kNotFound: no such ticket.
  Result<bool> outcome(std::uint64_t ticket, std::vector<Status>& outcome);

 private:
  struct Batch;
  SegmentVerifier();
  Status fill(Batch& batch, std::span<const DeviceImage> images, unsigned& segments) const;

  std::mutex mutex_;
  std::vector<std::unique_ptr<Batch>> free_;
  std::unordered_map<std::uint64_t, std::unique_ptr<Batch>> under_way_;
  std::uint64_t next_ticket_ = 1;
  std::size_t max_images_ = 0;
};

}  // namespace lmcn
