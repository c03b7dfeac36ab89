// A slot whose worker job has not ended is never handed out again, whatever the scheduler has forgotten. Races as scripts:
// the real host copier is stopped at its sequence points.
#include <thread>

#include "base/seq_points.hpp"
#include "lmcn/paged_copy.hpp"
#include "store/store_fixture.hpp"

namespace lmcn {
namespace {

class QuarantineTest : public StoreTest {
 protected:
  static constexpr std::int64_t kPage = 4096;
  static constexpr std::int64_t kBlocks = 64;
  static constexpr std::uint64_t kChunk = kPage;  // one layer, one block

  void SetUp() override {
    StoreTest::SetUp();
    SeqPoints::reset();
    open();
    paged.resize(static_cast<std::size_t>(kPage * kBlocks));
    for (std::size_t at = 0; at < paged.size(); ++at) paged[at] = static_cast<std::byte>(at / kPage + 1);
    const PagedKvLayout layout = PagedKvLayout::opaque({paged.data()}, kBlocks, kPage, kPage);
    auto slot = SlotLayout::make(layout, 1);
    ASSERT_TRUE(slot.ok());
    ASSERT_EQ(slot->rank_bytes, static_cast<std::int64_t>(kChunk));
    auto made = make_host_copier(layout, *slot, store->arena_base(), store->arena_bytes(), {});
    ASSERT_TRUE(made.ok()) << made.status().to_string();
    copier = std::move(*made);
  }
  void TearDown() override {
    SeqPoints::reset();
    copier.reset();
    StoreTest::TearDown();
  }

  void submit(std::uint64_t id, CopyDirection direction, const SlotRef& slot, std::int64_t block) {
    CopyJob job{.id = id, .direction = direction};
    job.items.push_back({.slot_offset = slot.offset, .generation = slot.generation, .tokens = 1});
    job.block_ids = {block};
    const Status submitted = copier->submit(std::move(job));
    ASSERT_TRUE(submitted.ok()) << submitted.to_string();
  }
  void wait(std::uint64_t id) { ASSERT_TRUE(copier->wait(std::span(&id, 1), 20s).ok()); }

  /// Chunk 0, stored from block 3, is being loaded into block 9 by job 2, which is held before it says that it has ended.
  struct HeldScatter {
    std::unique_ptr<Request> request;
    ReadLease lease;
    SlotRef slot;
  };
  void start_held_scatter(HeldScatter& load) {
    auto fill_lease = store->reserve(ns, keys(0, 1), kChunk, true);
    ASSERT_TRUE(fill_lease.ok());
    submit(1, CopyDirection::kGather, fill_lease->slots()[0], 3);
    wait(1);
    ASSERT_EQ(fill_lease->commit(), 1u);
    load.request = store->begin_request(ns, {});
    ASSERT_EQ(load.request->lookup(key(0)), Presence::kHit);
    auto lease = load.request->acquire(keys(0, 1), true);
    ASSERT_TRUE(lease.ok());
    load.lease = std::move(*lease);
    load.slot = load.lease.slots()[0];
    SeqPoints::hold("copier.before_scatter_done");
    submit(2, CopyDirection::kScatter, load.slot, 9);
    ASSERT_TRUE(SeqPoints::wait_until_reached("copier.before_scatter_done", 20s));
  }

  bool can_be_reused(std::uint64_t offset, int first_key) { return StoreTest::can_be_reused(offset, first_key, kChunk); }

  std::vector<std::byte> paged;
  std::unique_ptr<PagedCopier> copier;
};

TEST_F(QuarantineTest, ResetWhileAGatherRuns) {
  SeqPoints::hold("copier.before_publish");
  auto lease = store->reserve(ns, keys(0, 1), kChunk, true);
  ASSERT_TRUE(lease.ok());
  const SlotRef slot = lease->slots()[0];
  submit(1, CopyDirection::kGather, slot, 3);
  ASSERT_TRUE(SeqPoints::wait_until_reached("copier.before_publish", 20s));

  store->clear();  // the scheduler forgets its jobs
  lease->abort();
  EXPECT_EQ(store->stats().host_quarantined_slots, 1u);
  EXPECT_FALSE(can_be_reused(slot.offset, 1000));

  SeqPoints::release("copier.before_publish");
  wait(1);
  EXPECT_TRUE(can_be_reused(slot.offset, 50'000));
  EXPECT_EQ(store->stats().host_quarantined_slots, 0u);
  EXPECT_FALSE(in_host(0));
}

TEST_F(QuarantineTest, ResetWhileAScatterRuns) {
  HeldScatter load;
  ASSERT_NO_FATAL_FAILURE(start_held_scatter(load));

  store->clear();
  load.lease.release();
  load.request->end();
  EXPECT_FALSE(can_be_reused(load.slot.offset, 1000));

  SeqPoints::release("copier.before_scatter_done");
  wait(2);
  EXPECT_TRUE(can_be_reused(load.slot.offset, 50'000));
  EXPECT_EQ(std::memcmp(&paged[9 * kPage], &paged[3 * kPage], kPage), 0);
}

TEST_F(QuarantineTest, AnEvictionPassesOverASlotThatIsStillBeingRead) {
  HeldScatter load;
  ASSERT_NO_FATAL_FAILURE(start_held_scatter(load));

  load.lease.release();  // the engine reports too early
  load.request->end();
  EXPECT_FALSE(can_be_reused(load.slot.offset, 1000));
  EXPECT_TRUE(in_host(0));

  SeqPoints::release("copier.before_scatter_done");
  wait(2);
  EXPECT_TRUE(can_be_reused(load.slot.offset, 50'000));
}

TEST_F(QuarantineTest, ACommitBeforeTheWordDoesNotPublish) {
  SeqPoints::hold("copier.before_publish");
  auto lease = store->reserve(ns, keys(0, 1), kChunk, true);
  const SlotRef slot = lease->slots()[0];
  submit(1, CopyDirection::kGather, slot, 3);
  ASSERT_TRUE(SeqPoints::wait_until_reached("copier.before_publish", 20s));
  EXPECT_EQ(lease->commit(), 0u);
  EXPECT_FALSE(in_host(0));
  EXPECT_FALSE(can_be_reused(slot.offset, 1000));
  SeqPoints::release("copier.before_publish");
  wait(1);
  EXPECT_TRUE(can_be_reused(slot.offset, 50'000));
}

TEST_F(QuarantineTest, AJobThatCouldNotStartGivesItsSlotsBack) {
  auto fill_lease = store->reserve(ns, keys(0, 1), kChunk, true);
  const SlotRef slot = fill_lease->slots()[0];
  EXPECT_EQ(fill_lease->commit(), 0u);
  EXPECT_EQ(store->stats().host_quarantined_slots, 1u);
  const SlotRef older{slot.offset, slot.generation - 1};
  store->job_not_started(0, std::span(&older, 1), false);
  EXPECT_EQ(store->stats().host_quarantined_slots, 1u);
  store->job_not_started(0, std::span(&slot, 1), false);
  EXPECT_EQ(store->stats().host_quarantined_slots, 0u);

  ASSERT_TRUE(put(1));
  auto request = store->begin_request(ns, {});
  ASSERT_EQ(request->lookup(key(1)), Presence::kHit);
  auto lease = request->acquire(keys(1, 2), true);
  const SlotRef read = lease->slots()[0];
  lease->release();
  request->end();
  EXPECT_FALSE(can_be_reused(read.offset, 1000));
  store->job_not_started(0, std::span(&read, 1), true);
  EXPECT_TRUE(can_be_reused(read.offset, 50'000));
}

TEST_F(QuarantineTest, ACancelledJobPublishesWhatItStoredAndGivesTheOtherSlotsBack) {
  SeqPoints::hold("copier.before_unit");
  auto lease = store->reserve(ns, keys(0, 3), kChunk, true);
  ASSERT_TRUE(lease.ok());
  const std::vector<SlotRef> refs = lease->slots();
  CopyJob job{.id = 1, .direction = CopyDirection::kGather, .block_ids = {3, 4, 5}};
  for (std::uint32_t i = 0; i < 3; ++i) {
    job.items.push_back({.slot_offset = refs[i].offset, .generation = refs[i].generation, .tokens = 1, .block_begin = i});
  }
  ASSERT_TRUE(copier->submit(std::move(job)).ok());
  ASSERT_TRUE(SeqPoints::wait_until_reached("copier.before_unit", 20s));
  const std::uint64_t id = 1;
  copier->cancel(std::span(&id, 1));
  SeqPoints::release("copier.before_unit");
  wait(1);
  EXPECT_EQ(lease->commit(), 1u);
  EXPECT_TRUE(in_host(0));
  EXPECT_EQ(store->stats().host_quarantined_slots, 0u);
  EXPECT_TRUE(can_be_reused(refs[1].offset, 1000));
  EXPECT_TRUE(can_be_reused(refs[2].offset, 50'000));
}

TEST_F(QuarantineTest, AWorkerThatDiesGivesItsSlotsBack) {
  auto lease = store->reserve(ns, keys(0, 1), kChunk, true);
  const SlotRef slot = lease->slots()[0];
  lease->abort();
  EXPECT_FALSE(can_be_reused(slot.offset, 1000));
  store->on_rank_gone(0);
  EXPECT_TRUE(can_be_reused(slot.offset, 50'000));
}

}  // namespace
}  // namespace lmcn
