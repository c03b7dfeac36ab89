// The checksum kernel and its host side against xxHash, which seals the images and writes the table.
#include <algorithm>
#include <random>
#include <set>

#include "kernel_fixture.hpp"
#include "memory/slot_image.hpp"
#include "segment_verify.hpp"

namespace lmcn {
namespace {

constexpr std::size_t kImages = 64;

ChunkKey key_of(std::size_t index) {
  ChunkKey key{};
  std::memcpy(key.bytes.data(), &index, sizeof index);
  return key;
}

/// A sealed image of random bytes in the fake device's memory; the allocation ends with the payload.
class SealedImage {
 public:
  SealedImage(std::uint64_t payload_bytes, std::mt19937_64& random) : payload_bytes_(payload_bytes) {
    host_.resize(image_bytes(payload_bytes));
    for (std::size_t i = 0; i + 8 <= host_.size(); i += 8) {
      const std::uint64_t word = random();
      std::memcpy(host_.data() + i, &word, 8);
    }
    begin_slot(host_.data(), key_of(payload_bytes), {}, payload_bytes, 1, 1);
    seal_slot(host_.data(), 3, 4);
    device_ = fake_cuda::allocate(kPageBytes + payload_bytes, kKernelDevice);
    upload();
  }
  ~SealedImage() { fake_cuda::release(device_); }
  SealedImage(const SealedImage&) = delete;
  SealedImage& operator=(const SealedImage&) = delete;

  void upload() { std::memcpy(device_, host_.data(), kPageBytes + payload_bytes_); }
  void flip(std::size_t byte, unsigned bit = 0) { device_[byte] ^= static_cast<std::byte>(1u << bit); }
  DeviceImage described() const { return {device_, payload_bytes_, key_of(payload_bytes_), {}}; }
  std::byte* host() { return host_.data(); }
  std::uint64_t payload_bytes() const { return payload_bytes_; }

 private:
  const std::uint64_t payload_bytes_;
  std::vector<std::byte> host_;
  std::byte* device_ = nullptr;
};

class KernelVerify : public KernelTest {
 protected:
  std::vector<Status> verify(const std::vector<DeviceImage>& images) {
    Result<std::uint64_t> ticket = verifier_->enqueue(images, stream_);
    EXPECT_TRUE(ticket.ok()) << ticket.status().to_string();
    if (!ticket.ok()) return std::vector(images.size(), ticket.status());
    fake_cuda::synchronize(stream_, kKernelDevice);
    std::vector<Status> outcome;
    Result<bool> known = verifier_->outcome(*ticket, outcome);
    EXPECT_TRUE(known.ok() && *known);
    EXPECT_EQ(outcome.size(), images.size());
    return outcome;
  }
  Status verify(const SealedImage& image) { return verify(std::vector{image.described()}).at(0); }

  std::mt19937_64 random_{9};
  std::unique_ptr<SegmentVerifier> verifier_ = SegmentVerifier::make(kKernelDevice, kImages, 2).value();
};

// xxHash has a way of its own for 1-3, 4-8, 9-16, 17-128, 129-240 bytes and for more, by stripes of 64 bytes and blocks of 1024.
// The kernel has rounds of 64 blocks, and segments of 64 KiB.
TEST_F(KernelVerify, EveryLengthNearABoundary) {
  std::set<std::uint64_t> lengths;
  for (std::uint64_t n = 1; n <= 330; ++n) lengths.insert(n);
  for (const std::uint64_t around : {512u, 960u, 1024u, 1088u, 2048u, 3072u, 16384u, 63u * 1024, 65472u, 65536u, 65537u + 240,
                                     65536u + 1024, 2u * 65536, 3u * 65536 + 63u * 1024}) {
    for (std::uint64_t n = around - 2; n <= around + 2; ++n) lengths.insert(n);
  }
  for (int i = 0; i < 40; ++i) lengths.insert(random_() % 200000 + 1);
  std::vector<std::uint64_t> left(lengths.begin(), lengths.end());
  while (!left.empty()) {
    std::vector<std::unique_ptr<SealedImage>> images;
    std::vector<DeviceImage> described;
    for (std::size_t i = 0; i < kImages && !left.empty(); ++i, left.pop_back()) {
      images.push_back(std::make_unique<SealedImage>(left.back(), random_));
      described.push_back(images.back()->described());
    }
    const std::vector<Status> outcome = verify(described);
    for (std::size_t i = 0; i < outcome.size(); ++i) {
      ASSERT_TRUE(outcome[i].ok()) << images[i]->payload_bytes() << " bytes: " << outcome[i].to_string();
    }
  }
}

// Every byte counts: of the many lengths above, one whose sums cover all paths, with each of its 1500 bytes changed.
TEST_F(KernelVerify, AnyChangedByteIsSeen) {
  for (const std::uint64_t bytes : {3u, 7u, 15u, 90u, 239u, 1500u}) {
    std::vector<std::unique_ptr<SealedImage>> images;
    std::vector<DeviceImage> described;
    const auto check = [&] {
      for (const Status& status : verify(described)) EXPECT_EQ(status.code(), Code::kCorruption) << bytes;
      images.clear();
      described.clear();
    };
    for (std::uint64_t at = 0; at < bytes; at += bytes > 300 ? 7 : 1) {
      images.push_back(std::make_unique<SealedImage>(bytes, random_));
      images.back()->flip(kPageBytes + at, static_cast<unsigned>(random_() % 8));
      described.push_back(images.back()->described());
      if (images.size() == kImages) check();
    }
    if (!images.empty()) check();
  }
}

TEST_F(KernelVerify, TheSegmentThatDiffersIsNamed) {
  SealedImage image(5 * 65536 + 77, random_);
  EXPECT_TRUE(verify(image).ok());
  for (const std::size_t segment : {0u, 3u, 5u}) {
    image.upload();
    image.flip(kPageBytes + segment * 65536 + 20);
    const Status status = verify(image);
    EXPECT_EQ(status.code(), Code::kCorruption);
    EXPECT_NE(status.message().find("segment " + std::to_string(segment) + " of 6 does not match"), std::string::npos)
        << status.message();
  }
}

// Segments grow with the payload, as their table does not.
TEST_F(KernelVerify, SegmentsOf128KiB) {
  SealedImage image(std::uint64_t{kMaxSegments} * kMinSegmentBytes + 100'001, random_);
  ASSERT_EQ(slot_header(image.host())->segment_bytes, 2 * kMinSegmentBytes);
  image.flip(kPageBytes + image.payload_bytes() - 1);
  const Status status = verify(image);  // of the first segment that differs
  EXPECT_NE(status.message().find("segment 184 of 185"), std::string::npos) << status.to_string();
}

TEST_F(KernelVerify, HeadersAreCheckedWhole) {
  SealedImage image(1000, random_);
  DeviceImage described = image.described();
  const auto message = [&](const DeviceImage& asked) {
    const Status status = verify(std::vector{asked}).at(0);
    EXPECT_EQ(status.code(), Code::kCorruption);
    return std::string(status.message());
  };
  described.key = key_of(7);
  EXPECT_NE(message(described).find("key is"), std::string::npos);
  described = image.described();
  described.ns.bytes[0] = 1;
  EXPECT_NE(message(described).find("namespace is"), std::string::npos);
  described = image.described();
  described.payload_bytes = 999;
  EXPECT_NE(message(described).find("payload_bytes is 1000, expected 999"), std::string::npos);
  // The table, a field, the magic: the root covers them.
  for (const std::size_t at : {offsetof(SlotHeader, segment) + 8 * 5, offsetof(SlotHeader, rank_count), std::size_t{0}}) {
    image.upload();
    image.flip(at);
    EXPECT_NE(message(image.described()).find("slot header"), std::string::npos);
  }
  // Rank words are nobody's business here.
  image.upload();
  image.flip(offsetof(SlotHeader, rank) + 5);
  EXPECT_TRUE(verify(image).ok());
}

TEST_F(KernelVerify, BatchesAreBoundedAndAnswerOnce) {
  SealedImage image(70'000, random_);
  const std::vector<DeviceImage> one{image.described()};
  const Result<std::uint64_t> first = verifier_->enqueue(one, stream_), second = verifier_->enqueue(one, stream_);
  ASSERT_TRUE(first.ok() && second.ok());
  EXPECT_EQ(verifier_->enqueue(one, stream_).status().code(), Code::kResourceExhausted);
  fake_cuda::synchronize(stream_, kKernelDevice);
  std::vector<Status> outcome;
  EXPECT_TRUE(verifier_->outcome(*second, outcome).value());
  EXPECT_TRUE(outcome.at(0).ok());
  EXPECT_EQ(verifier_->outcome(*second, outcome).status().code(), Code::kNotFound);
  EXPECT_TRUE(verifier_->enqueue(one, stream_).ok());
  EXPECT_TRUE(verifier_->outcome(*first, outcome).value());
  fake_cuda::synchronize(stream_, kKernelDevice);
}

TEST_F(KernelVerify, AnswersOnlyAfterTheStreamGotThere) {
  SealedImage image(1000, random_);
  image.flip(kPageBytes + 3);
  Gate gate(stream_, kKernelDevice);
  fake_cuda::enqueue(stream_, kKernelDevice, [&] { image.upload(); });
  const Result<std::uint64_t> ticket = verifier_->enqueue(std::vector{image.described()}, stream_);
  std::vector<Status> outcome;
  EXPECT_FALSE(verifier_->outcome(*ticket, outcome).value());
  gate.open();
  fake_cuda::synchronize(stream_, kKernelDevice);
  EXPECT_TRUE(verifier_->outcome(*ticket, outcome).value());
  EXPECT_TRUE(outcome.at(0).ok());
}

TEST_F(KernelVerify, WhatIsWrongIsNamed) {
  SealedImage image(1000, random_);
  const auto message = [&](const std::vector<DeviceImage>& images) {
    const Status status = verifier_->enqueue(images, stream_).status();
    EXPECT_EQ(status.code(), Code::kInvalidArgument);
    return std::string(status.message());
  };
  EXPECT_EQ(message({}), "number of images is 0, must be in 1..64");
  EXPECT_EQ(message(std::vector(65, image.described())), "number of images is 65, must be in 1..64");
  DeviceImage wrong = image.described();
  wrong.image = nullptr;
  EXPECT_EQ(message({image.described(), wrong}), "images[1].image is 0, must be an address that is a multiple of 16");
  wrong.image = image.described().image + 8;
  EXPECT_NE(message({wrong}).find("images[0].image is"), std::string::npos);
  wrong = image.described();
  for (const std::uint64_t bytes : {std::uint64_t{0}, kMaxPayloadBytes + 1}) {
    wrong.payload_bytes = bytes;
    EXPECT_NE(message({wrong}).find("images[0].payload_bytes is"), std::string::npos);
  }
  EXPECT_EQ(SegmentVerifier::make(kKernelDevice, 0, 1).status().code(), Code::kInvalidArgument);
  EXPECT_EQ(SegmentVerifier::make(kKernelDevice, 65536, 1).status().code(), Code::kInvalidArgument);
  EXPECT_EQ(SegmentVerifier::make(kKernelDevice, 1, 0).status().code(), Code::kInvalidArgument);
}

TEST_F(KernelVerify, ErrorsOfCudaAreReported) {
  SealedImage image(1000, random_);
  const std::vector<DeviceImage> one{image.described()};
  for (const char* call : {"cudaSetDevice", "cudaHostAlloc", "cudaHostGetDevicePointer", "cudaEventCreateWithFlags"}) {
    ASSERT_EQ(cudaSetDevice(0), cudaSuccess);
    fake_cuda::fail(call, 1, cudaErrorMemoryAllocation);
    EXPECT_EQ(SegmentVerifier::make(kKernelDevice, 1, 1).status().code(), Code::kIoError) << call;
    ASSERT_EQ(cudaSetDevice(kKernelDevice), cudaSuccess);
  }
  for (const char* call : {"cudaLaunchKernelExC", "cudaEventRecord"}) {
    fake_cuda::fail(call, 1, cudaErrorLaunchOutOfResources);
    EXPECT_EQ(verifier_->enqueue(one, stream_).status().code(), Code::kIoError) << call;
  }
  // Both batches are lost.
  EXPECT_EQ(verifier_->enqueue(one, stream_).status().code(), Code::kResourceExhausted);
  verifier_ = SegmentVerifier::make(kKernelDevice, 1, 1).value();
  const Result<std::uint64_t> ticket = verifier_->enqueue(one, stream_);
  fake_cuda::synchronize(stream_, kKernelDevice);
  fake_cuda::fail("cudaEventQuery", 1, cudaErrorIllegalAddress);
  std::vector<Status> outcome;
  EXPECT_EQ(verifier_->outcome(*ticket, outcome).status().code(), Code::kIoError);
  EXPECT_EQ(verifier_->outcome(*ticket, outcome).status().code(), Code::kNotFound);
}

}  // namespace
}  // namespace lmcn
