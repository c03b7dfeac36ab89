// What a job promises, on any copier: refusals, slots that changed hands, the moment of publishing, the end.
#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <thread>

#include "base/seq_points.hpp"
#include "copier_fixture.hpp"
#include "memory/slot_image.hpp"

namespace lmcn::copier_suite {
namespace {

class CopierJobs : public CopierFixture {};

TEST_F(CopierJobs, RefusesWhatIsOutOfBoundsAndCopiesNothing) {
  struct Wrong {
    const char* named;  // in the message
    std::function<void(CopyJob&)> spoil;
  };
  const std::vector<Wrong> wrongs = {
      {"block_ids[1] is -1", [](CopyJob& j) { j.block_ids[1] = -1; }},
      {"block_ids[0] is 10", [](CopyJob& j) { j.block_ids[0] = kNumBlocks; }},
      {"block_ids[0] is 9223372036854775807", [](CopyJob& j) { j.block_ids[0] = INT64_MAX; }},
      {"tokens is 0", [](CopyJob& j) { j.items[0].tokens = 0; }},
      {"first_token + tokens is 9", [](CopyJob& j) { j.items[0].first_token = 1; }},
      {"first_token + tokens is 4294967303", [](CopyJob& j) { j.items[0].first_token = UINT32_MAX; }},
      {"token_in_block is 4", [](CopyJob& j) { j.items[0].token_in_block = 4; }},
      {"block_ids[2]", [](CopyJob& j) { j.items[0].token_in_block = 1; }},
      {"block_ids[4294967296]", [](CopyJob& j) { j.items[0].block_begin = UINT32_MAX; }},
      {"multiple of 4096", [](CopyJob& j) { j.items[0].slot_offset += 64; }},
      {"inside the arena", [&](CopyJob& j) { j.items[0].slot_offset = arena_->bytes(); }},
      // One page less than rank 1's end needs.
      {"inside the arena",
       [&](CopyJob& j) { j.items[0].slot_offset = arena_->bytes() - 2 * static_cast<std::uint64_t>(slot_.rank_bytes); }},
      {"inside the arena", [](CopyJob& j) { j.items[0].slot_offset = 0 - kPageBytes; }},
      {"generation is 7",
       [&](CopyJob& j) {
         j.items.push_back(j.items[0]);
         j.items[1].generation = 7;
       }},
  };
  for (const CopyDirection direction : {CopyDirection::kGather, CopyDirection::kScatter}) {
    for (const Wrong& wrong : wrongs) {
      CopyJob spoiled = job(1, direction, {0});
      wrong.spoil(spoiled);
      const Status status = copier_->submit(spoiled);
      EXPECT_EQ(status.code(), Code::kInvalidArgument) << wrong.named;
      EXPECT_NE(status.message().find(wrong.named), std::string::npos) << status.message();
    }
  }
  // None of the refused jobs is under way: their id is free.
  ASSERT_TRUE(copier_->submit({.id = 1}).ok());
  EXPECT_TRUE(only_result(1).ok);
  EXPECT_EQ(arena_->compare(), "");
  EXPECT_EQ(paged_->compare(), "");
}

TEST_F(CopierJobs, AnEmptyJobEndsAndAnUnknownIdIsNoWait) {
  const std::uint64_t unknown[] = {99};
  EXPECT_TRUE(copier_->wait(unknown, 0ms).ok());
  ASSERT_TRUE(copier_->submit({.id = 5}).ok());
  const CopyDone done = only_result(5);
  EXPECT_TRUE(done.ok);
  EXPECT_EQ(done.bytes, 0u);
  ASSERT_TRUE(copier_->submit({.id = 5}).ok()) << "an id is free again when its job has ended";
  EXPECT_TRUE(only_result(5).ok);
  EXPECT_TRUE(copier_->poll().empty());
}

TEST_F(CopierJobs, ASlotOfAnotherGenerationIsNotTouched) {
  expect_gathered(0);
  CopyJob gather = job(1, CopyDirection::kGather, {0, 1, 2});
  gather.items[1].generation += 1;
  ASSERT_TRUE(copier_->submit(gather).ok());
  CopyDone done = only_result(1);
  EXPECT_FALSE(done.ok);
  EXPECT_EQ(done.failed_items, std::vector<std::uint32_t>{1});
  EXPECT_NE(done.message.find("generation is 101"), std::string::npos) << done.message;
  expect_gathered(2);
  EXPECT_EQ(arena_->compare(), "");
  EXPECT_EQ(state(0), RankState::kOk);
  EXPECT_EQ(state(1), RankState::kEmpty);
  EXPECT_EQ(rank_state(arena_->image(1), 1, ArenaModel::generation(1) + 1), RankState::kEmpty);
  EXPECT_EQ(state(2), RankState::kOk);

  CopyJob scatter = job(2, CopyDirection::kScatter, {1});
  scatter.items[0].generation += 1;
  ASSERT_TRUE(copier_->submit(scatter).ok());
  done = only_result(2);
  EXPECT_FALSE(done.ok);
  EXPECT_EQ(done.bytes, 0u);
  EXPECT_EQ(paged_->compare(), "");
  EXPECT_EQ(loads_done(arena_->image(1), 1), 0u) << "the count belongs to the slot's new life";
}

TEST_F(CopierJobs, AMissingHeaderFailsTheItem) {
  slot_header(arena_->image(0))->magic = 0;
  arena_->expect_unchanged();
  for (const CopyDirection direction : {CopyDirection::kGather, CopyDirection::kScatter}) {
    ASSERT_TRUE(copier_->submit(job(1, direction, {0})).ok());
    const CopyDone done = only_result(1);
    EXPECT_FALSE(done.ok);
    EXPECT_NE(done.message.find("no slot header"), std::string::npos) << done.message;
  }
  EXPECT_EQ(arena_->compare(), "");
  EXPECT_EQ(paged_->compare(), "");
}

TEST_F(CopierJobs, ASlotWithoutRoomForThisRankFailsAndItsWordsSaySo) {
  const auto rank_bytes = static_cast<std::uint64_t>(slot_.rank_bytes);
  begin_slot(arena_->image(0), {}, {}, rank_bytes, 1, ArenaModel::generation(0));          // one rank only
  begin_slot(arena_->image(1), {}, {}, rank_bytes * 3 - 3, 3, ArenaModel::generation(1));  // smaller parts
  arena_->expect_unchanged();
  ASSERT_TRUE(copier_->submit(job(1, CopyDirection::kGather, {0, 1})).ok());
  EXPECT_EQ(only_result(1).failed_items, (std::vector<std::uint32_t>{0, 1}));
  EXPECT_EQ(state(0), RankState::kFailed);
  EXPECT_EQ(state(1), RankState::kFailed);
  ASSERT_TRUE(copier_->submit(job(2, CopyDirection::kScatter, {0, 1})).ok());
  EXPECT_EQ(only_result(2).failed_items, (std::vector<std::uint32_t>{0, 1}));
  EXPECT_EQ(loads_done(arena_->image(0), 1), 1u) << "a failed load has ended too";
  EXPECT_EQ(loads_done(arena_->image(1), 1), 1u);
  EXPECT_EQ(arena_->compare(), "");
  EXPECT_EQ(paged_->compare(), "");
}

TEST_F(CopierJobs, PublishesOnlyWhenAllBytesAreInPlace) {
  expect_gathered(0);
  expect_gathered(1);
  SeqPoints::hold("copier.before_publish");
  SeqPointScope scope;
  ASSERT_TRUE(copier_->submit(job(1, CopyDirection::kGather, {0, 1})).ok());
  ASSERT_TRUE(SeqPoints::wait_until_reached("copier.before_publish", 60s));
  EXPECT_EQ(arena_->compare(), "") << "bytes missing at the moment of publishing";
  EXPECT_EQ(state(0), RankState::kEmpty);
  EXPECT_EQ(state(1), RankState::kEmpty);
  EXPECT_TRUE(copier_->poll().empty());
  const std::uint64_t ids[] = {1};
  const Status waited = copier_->wait(ids, 1ms);
  EXPECT_EQ(waited.code(), Code::kDeadlineExceeded);
  EXPECT_NE(waited.message().find("job 1"), std::string::npos) << waited.message();
  const Status duplicate = copier_->submit(job(1, CopyDirection::kScatter, {2}));
  EXPECT_EQ(duplicate.code(), Code::kInvalidArgument);
  EXPECT_NE(duplicate.message().find("job id is 1"), std::string::npos) << duplicate.message();
  SeqPoints::release("copier.before_publish");
  EXPECT_TRUE(only_result(1).ok);
  EXPECT_EQ(state(0), RankState::kOk);
  EXPECT_EQ(state(1), RankState::kOk);
}

TEST_F(CopierJobs, AScatterIsCountedAfterItsBytesAreInPlace) {
  ASSERT_TRUE(copier_->submit(job(1, CopyDirection::kGather, {0})).ok());
  ASSERT_TRUE(only_result(1).ok);
  paged_->upload();
  SeqPoints::hold("copier.before_scatter_done");
  SeqPointScope scope;
  ASSERT_TRUE(copier_->submit(job(2, CopyDirection::kScatter, {0})).ok());
  ASSERT_TRUE(SeqPoints::wait_until_reached("copier.before_scatter_done", 60s));
  EXPECT_EQ(paged_->compare(), "");
  EXPECT_EQ(loads_done(arena_->image(0), 1), 0u);
  EXPECT_TRUE(copier_->poll().empty());
  SeqPoints::release("copier.before_scatter_done");
  EXPECT_TRUE(only_result(2).ok);
  EXPECT_EQ(loads_done(arena_->image(0), 1), 1u);
}

TEST_F(CopierJobs, ASlotHandedOutDuringTheJobIsNotPublished) {
  SeqPoints::hold("copier.before_publish");
  SeqPointScope scope;
  ASSERT_TRUE(copier_->submit(job(1, CopyDirection::kGather, {0})).ok());
  ASSERT_TRUE(SeqPoints::wait_until_reached("copier.before_publish", 60s));
  const std::uint32_t next = ArenaModel::generation(0) + 1;
  begin_slot(arena_->image(0), {}, {}, ArenaModel::kRanks * static_cast<std::uint64_t>(slot_.rank_bytes), ArenaModel::kRanks, next);
  publish_rank(arena_->image(0), 1, next, RankState::kOk);
  SeqPoints::release("copier.before_publish");
  const CopyDone done = only_result(1);
  EXPECT_FALSE(done.ok);
  EXPECT_EQ(done.failed_items, std::vector<std::uint32_t>{0});
  EXPECT_EQ(state(0), RankState::kEmpty);
  EXPECT_EQ(rank_state(arena_->image(0), 1, next), RankState::kOk) << "the word of the slot's new life was overwritten";
}

TEST_F(CopierJobs, DestructionEndsAcceptedJobs) {
  for (std::size_t s = 0; s < 3; ++s) {
    expect_gathered(s);
    ASSERT_TRUE(copier_->submit(job(s, CopyDirection::kGather, {s})).ok());
  }
  ASSERT_TRUE(copier_->submit(job(100, CopyDirection::kScatter, {3})).ok());
  copier_.reset();
  EXPECT_EQ(arena_->compare(), "");
  for (std::size_t s = 0; s < 3; ++s) EXPECT_EQ(state(s), RankState::kOk);
  EXPECT_EQ(loads_done(arena_->image(3), 1), 1u);
}

TEST_F(CopierJobs, ManyThreadsEachResultOnce) {
  constexpr std::uint64_t kJobsPerThread = 50;
  for (std::size_t s = 0; s < kSlots; ++s) expect_gathered(s);
  std::mutex mutex;
  std::map<std::uint64_t, int> results;
  const auto drain = [&] {
    for (const CopyDone& done : copier_->poll()) {
      std::lock_guard lock(mutex);
      EXPECT_TRUE(done.ok) << done.message;
      ++results[done.id];
    }
  };
  std::vector<std::thread> threads;
  for (std::size_t s = 0; s < kSlots; ++s) {
    threads.emplace_back([&, s] {
      for (std::uint64_t i = 0; i < kJobsPerThread; ++i) {
        const std::uint64_t ids[] = {s * kJobsPerThread + i};
        // A slot's jobs follow each other; different slots run side by side.
        ASSERT_TRUE(copier_->submit(job(ids[0], i % 2 == 0 ? CopyDirection::kGather : CopyDirection::kScatter, {s})).ok());
        ASSERT_TRUE(copier_->wait(ids, 60s).ok());
        drain();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  drain();
  EXPECT_EQ(results.size(), kSlots * kJobsPerThread);
  for (const auto& [id, count] : results) EXPECT_EQ(count, 1) << "job " << id;
  EXPECT_EQ(arena_->compare(), "");
  EXPECT_EQ(paged_->compare(), "");
  for (std::size_t s = 0; s < kSlots; ++s) EXPECT_EQ(loads_done(arena_->image(s), 1), kJobsPerThread / 2);
}

TEST_F(CopierJobs, MakeRefusesWhatDoesNotFit) {
  const auto refused = [&](const PagedKvLayout& paged, const SlotLayout& slot, std::byte* arena, std::uint32_t rank) {
    CopierOptions options;
    options.rank = rank;
    const auto made = backend_->make(paged, slot, arena, arena_->bytes(), options);
    return made.ok() ? std::string("made") : made.status().to_string();
  };
  EXPECT_NE(refused(paged_->layout(), slot_, arena_->base(), 64).find("invalid_argument: rank is 64, must be < 64"),
            std::string::npos);
  EXPECT_NE(refused(paged_->layout(), slot_, nullptr, 0).find("invalid_argument: arena_base is null"), std::string::npos);
  PagedKvLayout no_blocks = paged_->layout();
  no_blocks.num_blocks = 0;
  EXPECT_NE(refused(no_blocks, slot_, arena_->base(), 0).find("invalid_argument: num_blocks is 0"), std::string::npos);
  SlotLayout other = SlotLayout::make(3, case_.planes, paged_->layout().token_bytes(), case_.chunk_tokens).value();
  EXPECT_NE(refused(paged_->layout(), other, arena_->base(), 0).find("invalid_argument: the slot layout"), std::string::npos);
}

}  // namespace
}  // namespace lmcn::copier_suite
