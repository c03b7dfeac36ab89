// KV that is the same on every rank: one part, which rank 0 alone fills and publishes, and a slot that is in use until the last of
// its readers is through. The real host copier plays each rank.
#include <algorithm>
#include <array>
#include <optional>
#include <random>

#include "base/seq_points.hpp"
#include "lmcn/paged_copy.hpp"
#include "store/store_fixture.hpp"

namespace lmcn {
namespace {

constexpr std::uint32_t kRanks = 3;

class ReplicatedTest : public StoreTest {
 protected:
  static constexpr std::int64_t kPage = 4096;
  static constexpr std::int64_t kBlocks = 64;
  static constexpr std::uint64_t kChunk = kPage;  // one layer, one block, one rank's
  static constexpr auto kGather = CopyDirection::kGather;
  static constexpr auto kScatter = CopyDirection::kScatter;

  void SetUp() override {
    StoreTest::SetUp();
    SeqPoints::reset();
    options.rank_count = kRanks;
    options.replicated = true;
  }
  void TearDown() override {
    SeqPoints::reset();
    copiers = {};
    StoreTest::TearDown();
  }

  /// Block b of rank r is full of the byte r * 64 + b, so that no two are equal.
  void open_with_ranks() {
    open();
    for (std::uint32_t rank = 0; rank < kRanks; ++rank) {
      paged[rank].resize(static_cast<std::size_t>(kPage * kBlocks));
      for (std::size_t at = 0; at < paged[rank].size(); ++at) {
        paged[rank][at] = static_cast<std::byte>(rank * kBlocks + at / kPage);
      }
      copiers[rank] = copier_of(rank, true);
    }
  }
  std::unique_ptr<PagedCopier> copier_of(std::uint32_t rank, bool replicated) {
    const PagedKvLayout layout = PagedKvLayout::opaque({paged[rank].data()}, kBlocks, kPage, kPage);
    const SlotLayout slot = SlotLayout::make(layout, 1).value();
    CopierOptions wanted;
    wanted.rank = rank;
    wanted.replicated = replicated;
    auto made = make_host_copier(layout, slot, store->arena_base(), store->arena_bytes(), wanted);
    EXPECT_TRUE(made.ok()) << made.status().to_string();
    return made.ok() ? std::move(*made) : nullptr;
  }

  static Status submit(PagedCopier& copier, std::uint64_t id, CopyDirection direction, const SlotRef& slot, std::int64_t block) {
    CopyJob job{.id = id, .direction = direction};
    job.items.push_back({.slot_offset = slot.offset, .generation = slot.generation, .tokens = 1});
    job.block_ids = {block};
    return copier.submit(std::move(job));
  }
  /// Submits, waits, and answers as the job ended.
  static Status run(PagedCopier& copier, std::uint64_t id, CopyDirection direction, const SlotRef& slot, std::int64_t block) {
    LMCN_RETURN_IF_ERROR(submit(copier, id, direction, slot, block));
    LMCN_RETURN_IF_ERROR(copier.wait(std::span(&id, 1), 20s));
    for (const CopyDone& done : copier.poll()) {
      if (done.id == id) return done.ok ? Status() : Status(Code::kAborted, done.message);
    }
    return {Code::kInternal, "no result"};
  }

  WriteLease reserve(int i) {
    auto lease = store->reserve(ns, keys(i, i + 1), kChunk, true);
    EXPECT_TRUE(lease.ok()) << lease.status().to_string();
    return lease.ok() ? std::move(*lease) : WriteLease();
  }
  /// Chunk i, from rank 0's block.
  void store_chunk(int i, std::int64_t block) {
    WriteLease lease = reserve(i);
    ASSERT_EQ(run(*copiers[0], 1, kGather, lease.slots()[0], block).to_string(), "ok");
    ASSERT_EQ(lease.commit(), 1u);
  }
  struct Load {
    std::unique_ptr<Request> request;
    ReadLease lease;
    SlotRef slot;
    void forget() {
      lease.release();
      request->end();
    }
  };
  Load load(int i) {
    Load load{store->begin_request(ns, {}), {}, {}};
    EXPECT_TRUE(becomes([&] { return load.request->lookup(key(i)) == Presence::kHit; }));
    auto lease = load.request->acquire(keys(i, i + 1), true);
    EXPECT_TRUE(lease.ok()) << lease.status().to_string();
    if (lease.ok()) load.lease = std::move(*lease);
    load.slot = load.lease.slots().at(0);
    return load;
  }
  bool block_is_rank_zeros(std::uint32_t rank, std::int64_t block, std::int64_t stored) const {
    return std::memcmp(&paged[rank][block * kPage], &paged[0][stored * kPage], kPage) == 0;
  }
  bool can_be_reused(std::uint64_t offset, int first_key) { return StoreTest::can_be_reused(offset, first_key, kChunk); }

  std::array<std::vector<std::byte>, kRanks> paged;
  std::array<std::unique_ptr<PagedCopier>, kRanks> copiers;
};

TEST_F(ReplicatedTest, RankZeroFillsTheOnePartAndEveryRankReadsIt) {
  open_with_ranks();
  ASSERT_NO_FATAL_FAILURE(store_chunk(0, 3));
  Load first = load(0);
  EXPECT_EQ(first.lease.payload(0).size(), kChunk);
  for (std::uint32_t rank = 0; rank < kRanks; ++rank) {
    EXPECT_EQ(run(*copiers[rank], 2, kScatter, first.slot, 9).to_string(), "ok");
    EXPECT_TRUE(block_is_rank_zeros(rank, 9, 3)) << rank;
  }
}

TEST_F(ReplicatedTest, OnlyRankZerosWordPublishes) {
  open_with_ranks();
  WriteLease lease = reserve(0);
  const SlotRef slot = lease.slots()[0];
  for (std::uint32_t rank = 1; rank < kRanks; ++rank) lease.mark_filled(0, rank);
  EXPECT_EQ(lease.commit(), 0u);
  EXPECT_FALSE(in_host(0));
  EXPECT_EQ(store->stats().host_quarantined_slots, 1u);
  EXPECT_FALSE(can_be_reused(slot.offset, 1000));
  store->job_not_started(0, std::span(&slot, 1), false);
  EXPECT_EQ(store->stats().host_quarantined_slots, 0u);
}

TEST_F(ReplicatedTest, AnotherRankStoresNothing) {
  open_with_ranks();
  WriteLease lease = reserve(0);
  const SlotRef slot = lease.slots()[0];
  std::memset(lease.payload(0), 0xAB, kChunk);
  const Status refused = submit(*copiers[1], 1, kGather, slot, 3);
  EXPECT_EQ(refused.code(), Code::kInvalidArgument);
  EXPECT_NE(refused.message().find("rank 1 stores nothing"), std::string::npos) << refused.message();
  EXPECT_TRUE(std::ranges::all_of(std::span(lease.payload(0), kChunk), [](std::byte b) { return b == std::byte{0xAB}; }));
  // Nor does its saying so decide anything.
  store->job_not_started(1, std::span(&slot, 1), false);
  EXPECT_EQ(run(*copiers[0], 1, kGather, slot, 3).to_string(), "ok");
  EXPECT_EQ(lease.commit(), 1u);
}

// The last reader, whichever it is, is held before it says that it is through.
class LastReader : public ReplicatedTest, public ::testing::WithParamInterface<std::uint32_t> {};
INSTANTIATE_TEST_SUITE_P(Ranks, LastReader, ::testing::Range(0u, kRanks));

TEST_P(LastReader, KeepsTheSlotFromReuse) {
  const std::uint32_t last = GetParam();
  open_with_ranks();
  ASSERT_NO_FATAL_FAILURE(store_chunk(0, 3));
  Load slow = load(0);
  for (std::uint32_t rank = 0; rank < kRanks; ++rank) {
    if (rank != last) {
      EXPECT_EQ(run(*copiers[rank], 2, kScatter, slow.slot, 9).to_string(), "ok");
    }
  }
  SeqPoints::hold("copier.before_scatter_done");
  ASSERT_TRUE(submit(*copiers[last], 2, kScatter, slow.slot, 9).ok());
  ASSERT_TRUE(SeqPoints::wait_until_reached("copier.before_scatter_done", 20s));

  slow.forget();  // the engine reports too early
  EXPECT_FALSE(can_be_reused(slow.slot.offset, 1000));
  store->clear();
  EXPECT_EQ(store->stats().host_quarantined_slots, 1u);
  EXPECT_FALSE(can_be_reused(slow.slot.offset, 10'000));

  SeqPoints::release("copier.before_scatter_done");
  const std::uint64_t id = 2;
  ASSERT_TRUE(copiers[last]->wait(std::span(&id, 1), 20s).ok());
  EXPECT_TRUE(can_be_reused(slow.slot.offset, 50'000));
  EXPECT_TRUE(block_is_rank_zeros(last, 9, 3));
}

TEST_P(LastReader, ThatIsGoneReadsNoMore) {
  const std::uint32_t last = GetParam();
  open_with_ranks();
  ASSERT_NO_FATAL_FAILURE(store_chunk(0, 3));
  Load slow = load(0);
  for (std::uint32_t rank = 0; rank < kRanks; ++rank) {
    if (rank != last) {
      EXPECT_EQ(run(*copiers[rank], 2, kScatter, slow.slot, 9).to_string(), "ok");
    }
  }
  slow.forget();
  EXPECT_FALSE(can_be_reused(slow.slot.offset, 1000));
  store->on_rank_gone(last);
  EXPECT_TRUE(can_be_reused(slow.slot.offset, 50'000));
}

TEST_F(ReplicatedTest, OnlyTheEndOfRankZeroEndsAFill) {
  open_with_ranks();
  WriteLease lease = reserve(0);
  const SlotRef slot = lease.slots()[0];
  lease.abort();
  for (std::uint32_t rank = 1; rank < kRanks; ++rank) store->on_rank_gone(rank);
  EXPECT_FALSE(can_be_reused(slot.offset, 1000));
  store->on_rank_gone(0);
  EXPECT_TRUE(can_be_reused(slot.offset, 50'000));
}

TEST_F(ReplicatedTest, AReaderThatIsGoneSpoilsNoFill) {
  open_with_ranks();
  WriteLease lease = reserve(0);
  store->on_rank_gone(1);
  EXPECT_EQ(run(*copiers[0], 1, kGather, lease.slots()[0], 3).to_string(), "ok");
  EXPECT_EQ(lease.commit(), 1u);
}

TEST_F(ReplicatedTest, OneCopyLiesOnNvme) {
  with_nvme();
  open_with_ranks();
  ASSERT_NO_FATAL_FAILURE(store_chunk(0, 3));
  flush();
  const std::vector<RecordPlace> places = store->locate(keys(0, 1));
  ASSERT_EQ(places.size(), 1u);
  EXPECT_EQ(places[0].image_bytes, image_bytes(kChunk));
  copiers = {};
  ASSERT_NO_FATAL_FAILURE(reopen());
  ASSERT_TRUE(on_nvme_only(0));
  const std::vector<std::byte> stored(paged[0].begin() + 3 * kPage, paged[0].begin() + 4 * kPage);
  for (std::uint32_t rank = 0; rank < kRanks; ++rank) copiers[rank] = copier_of(rank, true);
  Load promoted = load(0);
  for (std::uint32_t rank = 0; rank < kRanks; ++rank) {
    EXPECT_EQ(run(*copiers[rank], 2, kScatter, promoted.slot, 9).to_string(), "ok");
    EXPECT_EQ(std::memcmp(&paged[rank][9 * kPage], stored.data(), kPage), 0) << rank;
  }
  promoted.forget();
  EXPECT_TRUE(can_be_reused(promoted.slot.offset, 1000));
}

TEST_F(ReplicatedTest, AWorkerOfAnotherMindTouchesNothing) {
  open_with_ranks();
  ASSERT_NO_FATAL_FAILURE(store_chunk(0, 3));
  {
    const auto own_part = copier_of(1, false);
    const Load one_part = load(0);
    EXPECT_NE(run(*own_part, 2, kScatter, one_part.slot, 9).message().find("for 1 ranks, rank 1 needs 4096"), std::string::npos);
  }
  options.replicated = false;
  copiers = {};
  open();
  auto lease = store->reserve(ns, keys(0, 1), kRanks * kChunk, true);
  ASSERT_TRUE(lease.ok());
  const auto shared_part = copier_of(0, true);
  const Status refused = run(*shared_part, 1, kGather, lease->slots()[0], 3);
  EXPECT_NE(refused.message().find("in 3 parts, expected one of 4096 for all ranks"), std::string::npos) << refused.message();
}

// The one slot that is left turns over all the time. Of each load a random rank begins when the others are through, and its lease
// is let go before that one has ended: its word alone keeps the slot from the next chunk.
TEST_F(ReplicatedTest, NoReaderMeetsTheNextChunk) {
  options.host_bytes = 4 << 20;
  options.max_payload_bytes = 64 << 10;
  open_with_ranks();
  std::vector<WriteLease> full;
  for (int i = 100'000;; ++i) {
    auto lease = store->reserve(ns, keys(i, i + 1), kChunk, false);
    if (!lease.ok()) break;
    full.push_back(std::move(*lease));
  }
  full.pop_back();
  std::mt19937 random(7);
  struct Late {
    std::uint32_t rank;
    std::uint64_t id;
    std::int64_t from;
  };
  std::optional<Late> before;
  for (int i = 0; i < 300; ++i) {
    Result<WriteLease> lease = Status(Code::kResourceExhausted, "");
    ASSERT_TRUE(becomes([&] {
      lease = store->reserve(ns, keys(i, i + 1), kChunk, true);
      return lease.ok();
    })) << store->stats().host_quarantined_slots;
    const std::int64_t from = i % 16;
    ASSERT_EQ(run(*copiers[0], 1, kGather, lease->slots()[0], from).to_string(), "ok");
    ASSERT_EQ(lease->commit(), 1u);
    if (before) {
      PagedCopier& reader = *copiers[before->rank];
      ASSERT_TRUE(reader.wait(std::span(&before->id, 1), 20s).ok());
      for (const CopyDone& done : reader.poll()) ASSERT_TRUE(done.ok) << "chunk " << i - 1 << ": " << done.message;
      ASSERT_TRUE(block_is_rank_zeros(before->rank, 17, before->from)) << "chunk " << i - 1 << ", rank " << before->rank;
    }
    Load next = load(i);
    const std::uint32_t last = static_cast<std::uint32_t>(random() % kRanks);
    for (std::uint32_t rank = 0; rank < kRanks; ++rank) {
      if (rank == last) continue;
      ASSERT_EQ(run(*copiers[rank], 2, kScatter, next.slot, 16).to_string(), "ok") << "chunk " << i << ", rank " << rank;
    }
    const auto id = static_cast<std::uint64_t>(10 + i);
    ASSERT_TRUE(submit(*copiers[last], id, kScatter, next.slot, 17).ok());
    before = {last, id, from};
    next.forget();
  }
}

}  // namespace
}  // namespace lmcn
