// Checksums taken on the device beside those of the host: whole images, and each kind of damage.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>

#include "gpu_check.hpp"
#include "memory/slot_image.hpp"
#include "segment_verify.hpp"

namespace lmcn::gpu_check {
namespace {

struct Image {
  std::vector<std::byte> bytes;
  std::uint64_t payload_bytes = 0;
  ChunkKey key = {};
  NamespaceId ns = {};
};

Image make_image(std::mt19937_64& random, std::uint64_t payload_bytes) {
  Image made{std::vector<std::byte>(image_bytes(payload_bytes)), payload_bytes, {}, {}};
  for (std::byte& b : made.bytes) b = static_cast<std::byte>(random());
  for (auto& b : made.key.bytes) b = static_cast<std::uint8_t>(random());
  for (auto& b : made.ns.bytes) b = static_cast<std::uint8_t>(random());
  begin_slot(made.bytes.data(), made.key, made.ns, payload_bytes, 1, 7);
  seal_slot(made.bytes.data(), 3, 5);
  return made;
}

/// One byte of what is checked: header or payload; or the expectation itself.
void damage(Image& image, std::mt19937_64& random) {
  switch (random() % 4) {
    case 0:
      image.bytes[random() % offsetof(SlotHeader, rank)] ^= std::byte{1};
      break;
    case 1:
      image.ns.bytes[random() % image.ns.bytes.size()] ^= 1;
      break;
    default:
      image.bytes[kPageBytes + random() % image.payload_bytes] ^= static_cast<std::byte>(1u << random() % 8);
      break;
  }
}

}  // namespace

void check_verify(GpuBackend& backend, int rounds) {
  constexpr std::size_t kImages = 6;
  auto made = SegmentVerifier::make(kDevice, kImages, 2);
  check(made.ok() ? Status() : made.status(), "make");
  cudaStream_t stream = nullptr;
  CHECK_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  std::mt19937_64 random(5);
  int whole = 0, damaged = 0;
  for (int round = 0; round < rounds; ++round) {
    std::vector<Image> images;
    std::vector<DeviceImage> on_device;
    for (std::size_t i = 0; i < kImages; ++i) {
      // Every length of XXH3's short inputs, then segments with and without a rest.
      const std::uint64_t limit = i == 0 ? 300 : i == 1 ? 1500 : std::uint64_t{1} << 20;
      images.push_back(make_image(random, 1 + random() % limit));
      if (random() % 2 == 0) damage(images.back(), random);
      const Image& image = images.back();
      std::byte* const memory = backend.allocate(image.bytes.size());
      backend.upload(memory, image.bytes.data(), image.bytes.size());
      on_device.push_back({memory, image.payload_bytes, image.key, image.ns});
    }
    CHECK_CUDA(cudaStreamSynchronize(nullptr));
    const Result<std::uint64_t> ticket = (*made)->enqueue(on_device, stream);
    check(ticket.ok() ? Status() : ticket.status(), "enqueue");
    CHECK_CUDA(cudaStreamSynchronize(stream));
    std::vector<Status> outcome;
    for (;;) {  // the stream has ended; what is left is moments
      const Result<bool> known = (*made)->outcome(ticket.value(), outcome);
      check(known.ok() ? Status() : known.status(), "outcome");
      if (known.value()) break;
      std::this_thread::yield();
    }
    for (std::size_t i = 0; i < kImages; ++i) {
      const Image& image = images[i];
      const Status expected = verify_slot(image.bytes.data(), image.bytes.size(), image.key, image.ns);
      check(outcome[i].code() == expected.code() ? "" : outcome[i].to_string() + ", on the host: " + expected.to_string(),
            "verify, round " + std::to_string(round) + ", payload of " + std::to_string(image.payload_bytes));
      ++(expected.ok() ? whole : damaged);
    }
    backend.release_all();
  }
  CHECK_CUDA(cudaStreamDestroy(stream));
  check(whole > 0 && damaged > 0 ? "" : "nothing happened", "verify");
  std::printf("  verify: %d whole images and %d damaged ones told apart as on the host\n", whole, damaged);
}

}  // namespace lmcn::gpu_check
