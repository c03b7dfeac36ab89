// Order between the engine's streams and the copier's, by each path; and that these tests would see a wait that is missing: the
// same scenes, with cudaStreamWaitEvent doing nothing, must end in wrong bytes.
#include <gtest/gtest.h>

#include "cuda_fixture.hpp"

namespace lmcn::copier_suite {
namespace {

class CudaOrder : public CudaFixture, public testing::WithParamInterface<const char*> {
 protected:
  CudaOrder() : CudaFixture(GetParam()) {}

  static int moved(const fake_cuda::State& state) { return state.copies_done + state.kernels_done; }

  /// The engine's stream stands still, then the model writes 2 over 1. What the slot holds after a store submitted meanwhile.
  std::byte stored(cudaStream_t stream, bool waits) {
    fake_cuda::reset();
    fake_cuda::ignore_waits(!waits);
    begin_slot(arena_->image(0), {}, {}, ArenaModel::kRanks * static_cast<std::uint64_t>(slot_.rank_bytes), ArenaModel::kRanks,
               ArenaModel::generation(0));
    std::byte* const memory = paged_->layout().layers[0].base;
    paged_->fill(std::byte{1});
    paged_->upload();
    Gate gate(stream, kDevice);
    fake_cuda::enqueue(stream, kDevice, [memory] { memory[0] = std::byte{2}; });
    CopyJob gather = job(1, CopyDirection::kGather, {0});
    gather.stream = reinterpret_cast<std::uint64_t>(stream);
    EXPECT_TRUE(submits_at_once(gather));
    if (waits) {
      // Until the copier either stands at the event or has copied too early.
      EXPECT_TRUE(fake_cuda::wait_until([](const auto& s) { return s.streams_waiting > 0 || moved(s) > 0; }));
      EXPECT_EQ(moved(fake_cuda::state()), 0);
      EXPECT_TRUE(copier_->poll().empty());
      EXPECT_EQ(state(0), RankState::kEmpty);
      gate.open();
    }
    EXPECT_TRUE(only_result(1).ok);
    EXPECT_EQ(state(0), RankState::kOk);
    gate.open();
    fake_cuda::synchronize(stream, kDevice);
    return arena_->image(0)[kPageBytes + static_cast<std::uint64_t>(slot_.rank_bytes)];  // rank 1's first
  }

  /// The engine's stream stands still, then the model reads. What it reads after a load submitted meanwhile.
  std::byte read(bool waits) {
    fake_cuda::reset();
    fake_cuda::ignore_waits(!waits);
    const std::byte* const memory = paged_->layout().layers[0].base;
    paged_->fill(std::byte{1});
    paged_->upload();
    Gate gate(engine_, kDevice);
    std::byte read{};
    fake_cuda::enqueue(engine_, kDevice, [&] { read = memory[0]; });
    EXPECT_TRUE(submits_at_once(engine_job(1, CopyDirection::kScatter, {0})));
    if (waits) {
      EXPECT_TRUE(fake_cuda::wait_until([](const auto& s) { return s.streams_waiting > 0 || moved(s) > 0; }));
      EXPECT_EQ(moved(fake_cuda::state()), 0);
      gate.open();
    }
    EXPECT_TRUE(only_result(1).ok);
    gate.open();
    fake_cuda::synchronize(engine_, kDevice);
    EXPECT_EQ(memory[0], arena_->image(0)[kPageBytes + static_cast<std::uint64_t>(slot_.rank_bytes)]);
    return read;
  }

  /// The model's stream waits for `layers` layers of a load that cannot begin, then compares them. "" when they are right.
  std::string seen_by_model(std::uint32_t layers, bool waits) {
    fake_cuda::reset();
    paged_->fill(std::byte{1});
    paged_->upload();
    Gate gate(engine_, kDevice);
    CopyJob load = layered_job(1, {0, 1});
    load.stream = reinterpret_cast<std::uint64_t>(engine_);
    EXPECT_TRUE(copier_->submit(load).ok());
    EXPECT_TRUE(copier_->wait_layers(1, 0, 60s, 0).ok());
    EXPECT_TRUE(fake_cuda::wait_until([](const auto& s) { return s.streams_waiting > 0; })) << "the copier's stream";
    fake_cuda::ignore_waits(!waits);
    const cudaStream_t model = fake_cuda::create_stream(kDevice);
    // Nothing can have been copied: the engine's stream stands still.
    EXPECT_TRUE(copier_->wait_layers(1, layers, 60s, reinterpret_cast<std::uint64_t>(model)).ok());
    EXPECT_EQ(moved(fake_cuda::state()), 0);
    for (const std::size_t s : {0, 1})
      for (std::int64_t layer = 0; layer < layers; ++layer) expect_loaded(s, layer);
    std::string differs = "not run";
    fake_cuda::enqueue(model, kDevice, [&] { differs = first_layers_differ(layers); });
    if (waits) {
      EXPECT_TRUE(fake_cuda::wait_until([](const auto& s) { return s.streams_waiting >= 2; })) << "the copier's and the model's";
      EXPECT_EQ(differs, "not run");
      gate.open();
    }
    fake_cuda::synchronize(model, kDevice);
    gate.open();
    EXPECT_TRUE(only_result(1).ok);
    fake_cuda::destroy_stream(model);
    return differs;
  }

  /// Of the leading layers, whose pages are the first allocations; later ones may be written meanwhile.
  std::string first_layers_differ(std::uint32_t layers) {
    for (std::int64_t layer = 0; layer < layers; ++layer)
      for (const std::int64_t block : {0, 1, 2, 3})
        for (std::int64_t t = 0; t < case_.block_tokens; ++t) {
          const PlaneStrides& s = paged_->layout().layers[static_cast<std::size_t>(layer)].planes[0];
          const std::byte* const have =
              paged_->layout().layers[static_cast<std::size_t>(layer)].base + s.offset + block * s.block + t * s.token;
          if (*have != paged_->at(layer, 0, block, t, 0, 0, 0)) return "layer " + std::to_string(layer) + " is not in place";
        }
    return "";
  }
};

TEST_P(CudaOrder, AStoreWaitsForTheModelsWrites) {
  for (const cudaStream_t stream : {engine_, cudaStream_t{nullptr}}) {
    ASSERT_TRUE(cudaSetDevice(kDevice) == cudaSuccess);  // whose legacy default stream is meant
    EXPECT_EQ(stored(stream, true), std::byte{2});
    ASSERT_TRUE(cudaSetDevice(0) == cudaSuccess);
  }
}

TEST_P(CudaOrder, ALoadWaitsForTheModelsEarlierReads) {
  EXPECT_EQ(read(true), std::byte{1});
}

TEST_P(CudaOrder, AStreamWaitsForItsLayersAndTheHostDoesNot) {
  EXPECT_EQ(seen_by_model(1, true), "");
  EXPECT_EQ(seen_by_model(2, true), "");
}

TEST_P(CudaOrder, AWaitThatIsMissingShowsInTheBytes) {
  const std::byte slot_first = arena_->image(0)[kPageBytes + static_cast<std::uint64_t>(slot_.rank_bytes)];
  EXPECT_EQ(read(false), slot_first);
  EXPECT_EQ(seen_by_model(2, false), "layer 0 is not in place");
  EXPECT_EQ(stored(engine_, false), std::byte{1});
}

INSTANTIATE_TEST_SUITE_P(All, CudaOrder, testing::Values("memcpy", "batch", "staged", "kernel"),
                         [](const auto& tested) { return std::string(tested.param); });

}  // namespace
}  // namespace lmcn::copier_suite
