// Making an arena known to CUDA: in pieces, in the background, by one or several copiers, and what copies do where it fails.
#include <gtest/gtest.h>

#include "base/seq_points.hpp"
#include "cuda_fixture.hpp"
#include "host_registration.hpp"

namespace lmcn::copier_suite {
namespace {

constexpr std::uint64_t kPiece = 64 << 10;

/// Host memory of six pieces and a bit.
class Registration : public testing::Test {
 protected:
  static constexpr std::uint64_t kBytes = 6 * kPiece + 4096;
  Registration() { fake_cuda::reset(); }
  ~Registration() override {
    EXPECT_EQ(fake_cuda::state().live_registrations, 0);
    fake_cuda::release_host(memory_);
    fake_cuda::reset();
  }
  std::shared_ptr<HostRegistration> make(unsigned threads = 3, std::uint64_t slot_bytes = 0) {
    return HostRegistration::of(memory_, kBytes, kDevice, {kPiece, slot_bytes, threads});
  }
  std::byte* const memory_ = fake_cuda::allocate_host(kBytes);
};

TEST_F(Registration, CoversEverythingInPiecesAndEndsWithItsLastHolder) {
  auto first = make();
  ASSERT_TRUE(first->wait_ended(60s).ok());
  EXPECT_EQ(fake_cuda::calls("cudaHostRegister"), 7);
  EXPECT_EQ(fake_cuda::state().registered_bytes, kBytes);
  EXPECT_EQ(first->progress().mapped_bytes, kBytes);
  EXPECT_EQ(first->progress().found_bytes, 0u);
  auto second = make();
  EXPECT_EQ(second, first);
  first.reset();
  EXPECT_EQ(fake_cuda::state().live_registrations, 7);
  second.reset();
  EXPECT_EQ(fake_cuda::state().live_registrations, 0);
  auto again = make();
  ASSERT_TRUE(again->wait_ended(60s).ok());
  EXPECT_EQ(fake_cuda::state().live_registrations, 7);
}

TEST_F(Registration, ADeviceAddressIsOfOnePieceAndNotTheHosts) {
  const auto registration = make();
  ASSERT_TRUE(registration->wait_ended(60s).ok());
  std::byte* const mapped = registration->device_address(memory_ + 100, 1000);
  ASSERT_NE(mapped, nullptr);
  EXPECT_NE(mapped, memory_ + 100);
  memory_[100] = std::byte{42};
  EXPECT_EQ(*mapped, std::byte{42});
  EXPECT_NE(registration->device_address(memory_ + kPiece, kPiece), nullptr);
  EXPECT_EQ(registration->device_address(memory_ + kPiece, kPiece + 1), nullptr);
  EXPECT_EQ(registration->device_address(memory_ + kPiece - 1, 2), nullptr);
  EXPECT_EQ(registration->bytes_to_border(memory_ + kPiece - 1), 1);
  EXPECT_EQ(registration->bytes_to_border(memory_ + kPiece), static_cast<std::int64_t>(kPiece));
}

TEST_F(Registration, BordersFallBetweenSlots) {
  const std::uint64_t slot = 12 << 10;  // five to a piece of 60 KiB
  const auto registration = make(1, slot);
  ASSERT_TRUE(registration->wait_ended(60s).ok());
  for (std::uint64_t at = 0; at + slot <= kBytes; at += slot)
    EXPECT_NE(registration->device_address(memory_ + at, slot), nullptr) << at;
  EXPECT_EQ(registration->bytes_to_border(memory_), static_cast<std::int64_t>(5 * slot));
}

TEST_F(Registration, WhatCannotBeLockedStaysOrdinaryMemory) {
  fake_cuda::set_lockable(3 * kPiece);
  const auto registration = make(1);
  ASSERT_TRUE(registration->wait_ended(60s).ok());
  EXPECT_EQ(registration->progress().mapped_bytes, 3 * kPiece);
  EXPECT_EQ(registration->progress().failure.message(), "cudaHostRegister: out of memory (2)");
  EXPECT_EQ(registration->describe(), "0.00 of 0.00 GiB registered, not the rest: cudaHostRegister: out of memory (2)");
  EXPECT_EQ(fake_cuda::calls("cudaHostRegister"), 4) << "no more is tried after the first failure";
  EXPECT_NE(registration->device_address(memory_, 1), nullptr);
  EXPECT_EQ(registration->device_address(memory_ + 3 * kPiece, 1), nullptr);
}

TEST_F(Registration, EveryCallMayFail) {
  for (const std::string call : {"cudaSetDevice", "cudaHostRegister", "cudaHostGetDevicePointer"}) {
    fake_cuda::reset();
    fake_cuda::fail(call, 1, cudaErrorInvalidValue);
    const auto registration = make(1);
    ASSERT_TRUE(registration->wait_ended(60s).ok());
    EXPECT_EQ(registration->progress().failure.message(), call + ": invalid argument (1)");
    EXPECT_EQ(registration->progress().mapped_bytes, 0u);
    EXPECT_EQ(registration->device_address(memory_, 1), nullptr);
    EXPECT_EQ(fake_cuda::state().live_registrations, 0) << call;
  }
}

TEST_F(Registration, WhatSomebodyElseRegisteredIsUsedAndLeftToThem) {
  ASSERT_EQ(cudaHostRegister(memory_, kBytes, cudaHostRegisterDefault), cudaSuccess);
  {
    const auto registration = make();
    ASSERT_TRUE(registration->wait_ended(60s).ok());
    EXPECT_EQ(registration->progress().found_bytes, kBytes);
    EXPECT_EQ(registration->describe(), "0.00 GiB registered (0.00 by somebody else)");
    EXPECT_NE(registration->device_address(memory_ + 5 * kPiece, kPiece), memory_ + 5 * kPiece);
    ASSERT_NE(registration->device_address(memory_ + 5 * kPiece, kPiece), nullptr);
  }
  EXPECT_EQ(fake_cuda::state().live_registrations, 1);
  EXPECT_EQ(cudaHostUnregister(memory_), cudaSuccess);
}

TEST_F(Registration, WhatSomebodyElseRegisteredInPartIsNotUsed) {
  ASSERT_EQ(cudaHostRegister(memory_ + 2 * kPiece, kPiece / 2, cudaHostRegisterDefault), cudaSuccess);
  {
    const auto registration = make(1);
    ASSERT_TRUE(registration->wait_ended(60s).ok());
    EXPECT_EQ(registration->progress().mapped_bytes, 2 * kPiece);
    EXPECT_FALSE(registration->progress().failure.ok());
    EXPECT_EQ(registration->device_address(memory_ + 2 * kPiece, 1), nullptr);
  }
  EXPECT_EQ(cudaHostUnregister(memory_ + 2 * kPiece), cudaSuccess);
}

// Where addresses are not unified, what is registered is seen only where it was asked for; and what a device may not write is no
// slot.
TEST_F(Registration, WhatSomebodyElseRegisteredInAnotherWayIsNotUsed) {
  struct Way {
    bool unified;
    unsigned flags;
    bool used;
  };
  constexpr unsigned kBoth = cudaHostRegisterPortable | cudaHostRegisterMapped;
  for (const Way& way :
       {Way{true, cudaHostRegisterDefault, true}, Way{true, cudaHostRegisterReadOnly, false},
        Way{true, kBoth | cudaHostRegisterReadOnly, false}, Way{false, kBoth, true}, Way{false, cudaHostRegisterDefault, false},
        Way{false, cudaHostRegisterMapped, false}, Way{false, cudaHostRegisterPortable, false}}) {
    SCOPED_TRACE("unified " + std::to_string(way.unified) + ", flags " + std::to_string(way.flags));
    fake_cuda::reset();
    fake_cuda::set_unified(way.unified);
    ASSERT_TRUE(cudaSetDevice(kDevice) == cudaSuccess);
    ASSERT_EQ(cudaHostRegister(memory_, kBytes, way.flags), cudaSuccess);
    ASSERT_TRUE(cudaSetDevice(0) == cudaSuccess);
    {
      const auto registration = make(1);
      ASSERT_TRUE(registration->wait_ended(60s).ok());
      EXPECT_EQ(registration->progress().found_bytes, way.used ? kBytes : 0);
      EXPECT_EQ(registration->progress().failure.ok(), way.used);
      EXPECT_EQ(registration->device_address(memory_ + kPiece, 1) != nullptr, way.used);
    }
    EXPECT_EQ(cudaHostUnregister(memory_), cudaSuccess);
  }
}

TEST_F(Registration, SaysWhyWhatSomebodyElseRegisteredIsNotUsed) {
  const auto why = [this](unsigned flags) {
    EXPECT_EQ(cudaHostRegister(memory_, kBytes, flags), cudaSuccess);
    const auto registration = make(1);
    EXPECT_TRUE(registration->wait_ended(60s).ok());
    EXPECT_EQ(cudaHostUnregister(memory_), cudaSuccess);
    return registration->progress().failure.to_string();
  };
  EXPECT_EQ(why(cudaHostRegisterReadOnly),
            "unsupported: somebody else registered it with flags 8, portable and mapped memory (3) is needed that is neither I/O "
            "memory nor read-only");
  for (const std::string call : {"cudaHostGetFlags", "cudaDeviceGetAttribute"}) {
    fake_cuda::fail(call, 1, cudaErrorInvalidValue);
    EXPECT_EQ(why(cudaHostRegisterDefault), "io_error: " + call + ": invalid argument (1)");
  }
}

TEST_F(Registration, AnArenaOverAnotherIsRefused) {
  const auto registration = make();
  ASSERT_TRUE(registration->wait_ended(60s).ok());
  const auto over = HostRegistration::of(memory_ + kPiece, 2 * kPiece, kDevice, {kPiece, 0, 1});
  ASSERT_TRUE(over->wait_ended(60s).ok());
  EXPECT_EQ(over->progress().failure.code(), Code::kInvalidArgument);
  EXPECT_EQ(over->device_address(memory_ + kPiece, 1), nullptr);
}

TEST_F(Registration, EndsWhileRegistering) {
  SeqPoints::hold("registration.before_piece");
  auto registration = make(2);
  std::thread ending;
  {
    SeqPointScope scope;
    ASSERT_TRUE(SeqPoints::wait_until_reached("registration.before_piece", 60s, 2));
    ending = std::thread([&] { registration.reset(); });
    // Both threads stand before a piece; whoever asks for the arena meanwhile gets a registration of its own, after this one.
    SeqPoints::step("registration.before_piece");
  }
  ending.join();
  EXPECT_EQ(fake_cuda::state().live_registrations, 0);
}

TEST_F(Registration, ManyHoldersComingAndGoing) {
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([this, t] {
      for (int round = 0; round < 25; ++round) {
        const auto registration = make(2);
        const bool waits = round % 3 == 0;
        EXPECT_TRUE(!waits || registration->wait_ended(60s).ok());
        EXPECT_EQ(registration->progress().found_bytes, 0u) << "it found what another one was about to unregister";
        if (std::byte* const mapped = registration->device_address(memory_ + kPiece, kPiece)) mapped[t] = std::byte{1};
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

/// A copier on an arena that a registration with small pieces was begun for.
class CudaArena : public CudaFixture, public testing::WithParamInterface<const char*> {
 protected:
  CudaArena() : CudaFixture(GetParam()) {}
  void remake(std::uint64_t piece_bytes, bool wait = true) {
    copier_.reset();
    held_.reset();
    held_ = HostRegistration::of(arena_->base(), arena_->bytes(), kDevice, {piece_bytes, 0, 1});
    auto made = wait ? backend_->make(paged_->layout(), slot_, arena_->base(), arena_->bytes(), case_.options)
                     : make_cuda_copier(paged_->layout(), slot_, arena_->base(), arena_->bytes(), case_.options, kDevice);
    ASSERT_TRUE(made.ok()) << made.status().to_string();
    copier_ = std::move(made).value();
  }
  /// Stores slots 0 and 1 and loads 2 and 3, each right.
  void expect_copies() {
    ASSERT_TRUE(copier_->submit(job(1, CopyDirection::kGather, {0, 1})).ok());
    EXPECT_EQ(only_result(1).message, "");
    for (const std::size_t s : {0, 1}) expect_gathered(s);
    EXPECT_EQ(arena_->compare(), "");
    ASSERT_TRUE(copier_->submit(job(2, CopyDirection::kScatter, {2, 3})).ok());
    EXPECT_EQ(only_result(2).message, "");
    for (const std::size_t s : {2, 3})
      for (const std::int64_t layer : {0, 1}) expect_loaded(s, layer);
    EXPECT_EQ(paged_->compare(), "");
  }
  bool needs_mapped() const { return std::string(GetParam()) == "batch" || std::string(GetParam()) == "kernel"; }
  std::string slow_items(int count) const {
    return needs_mapped() ? "; " + std::to_string(count) + " items copied by memcpy for want of registered memory" : "";
  }

  std::shared_ptr<HostRegistration> held_;
};

TEST_P(CudaArena, SlotsThatCrossBordersAreCopiedInPieces) {
  copier_.reset();
  case_.heads = 96;  // a rank's part of twelve pages
  paged_ = std::make_unique<PagedModel>(*backend_, case_, kNumBlocks);
  std::mt19937_64 random(4);
  paged_->fill_random(random);
  paged_->upload();
  slot_ = SlotLayout::make(paged_->layout(), case_.chunk_tokens).value();
  arena_ = std::make_unique<ArenaModel>(*backend_, case_, slot_, kSlots);
  remake(5 * 4096);  // neither a part nor a row of one fits
  expect_copies();
  EXPECT_NE(copier_->details().find("GiB registered" + slow_items(4)), std::string::npos) << copier_->details();
}

TEST_P(CudaArena, NothingLockedStillCopies) {
  copier_.reset();
  fake_cuda::set_lockable(0);
  remake(1 << 20);
  expect_copies();
  EXPECT_EQ(copier_->details(),
            std::string(GetParam()) +
                " as LMCN_COPY_PATH asks; arena 0.00 of 0.00 GiB registered, not the rest: cudaHostRegister: out "
                "of memory (2)" +
                slow_items(4));
}

TEST_P(CudaArena, AnArenaThatSomebodyElseRegistered) {
  copier_.reset();
  ASSERT_EQ(cudaHostRegister(arena_->base(), arena_->bytes(), cudaHostRegisterDefault), cudaSuccess);
  remake(1 << 20);
  expect_copies();
  EXPECT_EQ(copier_->details(),
            std::string(GetParam()) + " as LMCN_COPY_PATH asks; arena 0.00 GiB registered (0.00 by somebody else)");
  copier_.reset();
  held_.reset();
  EXPECT_EQ(cudaHostUnregister(arena_->base()), cudaSuccess);
}

TEST_P(CudaArena, CopiesBeforeTheRegistrationGotThere) {
  SeqPointScope scope;
  copier_.reset();
  SeqPoints::hold("registration.before_piece");
  remake(1 << 20, false);
  expect_copies();
  EXPECT_EQ(copier_->details(),
            std::string(GetParam()) + " as LMCN_COPY_PATH asks; arena 0.00 of 0.00 GiB registered so far" + slow_items(4));
  SeqPoints::release("registration.before_piece");
  ASSERT_TRUE(held_->wait_ended(60s).ok());
  fake_cuda::reset();
  ASSERT_TRUE(copier_->submit(job(3, CopyDirection::kScatter, {2, 3})).ok());
  EXPECT_TRUE(only_result(3).ok);
  EXPECT_EQ(fake_cuda::calls("cuMemcpyBatchAsync") > 0, std::string(GetParam()) == "batch");
  EXPECT_EQ(copier_->details(), std::string(GetParam()) + " as LMCN_COPY_PATH asks; arena 0.00 GiB registered" + slow_items(4));
}

TEST_P(CudaArena, TwoCopiersOnOneArena) {
  auto second = backend_->make(paged_->layout(), slot_, arena_->base(), arena_->bytes(), case_.options);
  ASSERT_TRUE(second.ok());
  EXPECT_EQ(fake_cuda::state().live_registrations, 1);
  copier_.reset();
  EXPECT_EQ(fake_cuda::state().live_registrations, 1);
  copier_ = std::move(second).value();
  expect_copies();
  copier_.reset();
  EXPECT_EQ(fake_cuda::state().live_registrations, 0);
}

INSTANTIATE_TEST_SUITE_P(All, CudaArena, testing::Values("memcpy", "batch", "staged", "kernel"),
                         [](const auto& tested) { return std::string(tested.param); });

}  // namespace
}  // namespace lmcn::copier_suite
