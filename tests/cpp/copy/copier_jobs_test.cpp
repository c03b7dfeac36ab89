// What a job promises, on any copier: refusals, slots that changed hands, the moment of publishing, the end.
#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <set>
#include <thread>

#include "base/seq_points.hpp"
#include "child_process.hpp"
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

TEST_F(CopierJobs, ACancelledStoreEndsWithWhatWasStarted) {
  expect_gathered(2);
  SeqPoints::hold("copier.before_unit");
  SeqPointScope scope;
  ASSERT_TRUE(copier_->submit(job(1, CopyDirection::kGather, {2, 0, 1})).ok());
  ASSERT_TRUE(SeqPoints::wait_until_reached("copier.before_unit", 60s));
  const std::uint64_t ids[] = {77, 1, 1};
  copier_->cancel(ids);
  EXPECT_TRUE(copier_->poll().empty()) << "cancel() has waited";
  SeqPoints::release("copier.before_unit");
  const CopyDone done = only_result(1);
  EXPECT_FALSE(done.ok);
  EXPECT_EQ(done.failed_items, (std::vector<std::uint32_t>{1, 2}));
  EXPECT_NE(done.message.find("cancelled"), std::string::npos) << done.message;
  EXPECT_EQ(arena_->compare(), "");
  EXPECT_EQ(state(2), RankState::kOk);
  EXPECT_EQ(state(0), RankState::kFailed);
  EXPECT_EQ(state(1), RankState::kFailed);
  copier_->cancel(ids);  // ended
  EXPECT_TRUE(copier_->poll().empty());
  expect_gathered(0);
  ASSERT_TRUE(copier_->submit(job(1, CopyDirection::kGather, {0})).ok()) << "the id is free again, and not cancelled";
  EXPECT_TRUE(only_result(1).ok);
  EXPECT_EQ(arena_->compare(), "");
}

TEST_F(CopierJobs, ACancelledLoadIsCountedOnEachOfItsSlots) {
  SeqPoints::hold("copier.before_unit");
  SeqPointScope scope;
  CopyJob load = job(1, CopyDirection::kScatter, {0, 1});
  load.items.push_back(load.items[1]);  // two items of one slot
  ASSERT_TRUE(copier_->submit(load).ok());
  ASSERT_TRUE(copier_->submit(job(2, CopyDirection::kScatter, {2, 3})).ok());
  ASSERT_TRUE(SeqPoints::wait_until_reached("copier.before_unit", 60s));
  const std::uint64_t ids[] = {2, 1};
  copier_->cancel(ids);
  SeqPoints::release("copier.before_unit");
  ASSERT_TRUE(copier_->wait(ids, 60s).ok());
  std::map<std::uint64_t, CopyDone> done;
  for (CopyDone& d : copier_->poll()) done[d.id] = d;
  ASSERT_EQ(done.size(), 2u);
  EXPECT_EQ(done[1].failed_items, (std::vector<std::uint32_t>{1, 2}));
  EXPECT_EQ(done[2].failed_items, (std::vector<std::uint32_t>{0, 1})) << "it was in the queue";
  EXPECT_EQ(done[2].bytes, 0u);
  for (std::size_t s = 0; s < kSlots; ++s) EXPECT_EQ(loads_done(arena_->image(s), 1), 1u) << "slot " << s << " stays quarantined";
}

// blocking_timeout of a load must not be that of the stores before it.
TEST_F(CopierJobs, ACancelledJobEndsAheadOfThoseBeforeIt) {
  expect_gathered(0);
  expect_gathered(1);
  SeqPoints::hold("copier.before_unit");
  SeqPointScope scope;
  ASSERT_TRUE(copier_->submit(job(1, CopyDirection::kGather, {0})).ok());
  ASSERT_TRUE(SeqPoints::wait_until_reached("copier.before_unit", 60s));
  ASSERT_TRUE(copier_->submit(job(2, CopyDirection::kGather, {1})).ok());
  ASSERT_TRUE(copier_->submit(job(3, CopyDirection::kScatter, {2})).ok());
  const std::uint64_t ids[] = {3}, all[] = {1, 2, 3};
  copier_->cancel(ids);
  SeqPoints::step("copier.before_unit");  // job 1's only one; job 2's is held
  ASSERT_TRUE(copier_->wait(ids, 60s).ok());
  std::set<std::uint64_t> ended;
  for (const CopyDone& d : copier_->poll()) ended.insert(d.id);
  EXPECT_TRUE(ended.contains(3));
  EXPECT_FALSE(ended.contains(2));
  SeqPoints::release("copier.before_unit");
  ASSERT_TRUE(copier_->wait(all, 60s).ok());
  EXPECT_EQ(arena_->compare(), "");
}

TEST_F(CopierJobs, LayerByLayerTheFirstLayersAreThereFirst) {
  SeqPoints::hold("copier.before_unit");
  SeqPointScope scope;
  ASSERT_TRUE(copier_->submit(layered_job(1, {2, 0})).ok());
  const auto reach_unit = [&](int unit) {  // (layer, item) in order; the one before it has been started
    for (int i = 0; i < unit; ++i) {
      ASSERT_TRUE(SeqPoints::wait_until_reached("copier.before_unit", 60s));
      SeqPoints::step("copier.before_unit");
    }
    ASSERT_TRUE(SeqPoints::wait_until_reached("copier.before_unit", 60s));
  };
  ASSERT_NO_FATAL_FAILURE(reach_unit(1));  // layer 0's second item
  EXPECT_TRUE(copier_->wait_layers(1, 0, 0ms, 0).ok());
  const Status early = copier_->wait_layers(1, 1, 1ms, 0);
  EXPECT_EQ(early.code(), Code::kDeadlineExceeded);
  EXPECT_EQ(early.message(), "job 1: the first 1 layers are not in place after 1 ms");
  std::thread waiter([&] { EXPECT_TRUE(copier_->wait_layers(1, 1, 60s, 0).ok()); });
  ASSERT_NO_FATAL_FAILURE(reach_unit(1));  // layer 1's first item
  waiter.join();
  backend_->synchronize();
  expect_loaded(2, 0);
  expect_loaded(0, 0);
  EXPECT_EQ(paged_->compare(), "") << "the first layer of all items and nothing else";
  EXPECT_EQ(copier_->wait_layers(1, 2, 1ms, 0).code(), Code::kDeadlineExceeded);
  EXPECT_EQ(loads_done(arena_->image(2), 1), 0u);
  SeqPoints::release("copier.before_unit");
  EXPECT_TRUE(copier_->wait_layers(1, 2, 60s, 0).ok());
  backend_->synchronize();
  expect_loaded(2, 1);
  expect_loaded(0, 1);
  EXPECT_EQ(paged_->compare(), "");
  EXPECT_TRUE(only_result(1).ok);
  EXPECT_EQ(loads_done(arena_->image(2), 1), 1u);
}

TEST_F(CopierJobs, LayersOfJobsThatEndedFailedOrNeverWere) {
  ASSERT_TRUE(copier_->submit(layered_job(1, {0})).ok());
  ASSERT_TRUE(only_result(1).ok);
  EXPECT_TRUE(copier_->wait_layers(1, 2, 0ms, 0).ok()) << "polled already";
  EXPECT_EQ(copier_->wait_layers(1, 3, 0ms, 0).code(), Code::kInvalidArgument);
  EXPECT_EQ(copier_->wait_layers(2, 1, 0ms, 0).code(), Code::kNotFound);

  CopyJob wrong = layered_job(2, {0, 1});
  wrong.items[1].generation += 1;
  ASSERT_TRUE(copier_->submit(wrong).ok());
  const Status failed = copier_->wait_layers(2, 1, 60s, 0);
  EXPECT_EQ(failed.code(), Code::kAborted);
  EXPECT_NE(failed.message().find("job 2 failed: "), std::string::npos) << failed.message();
  EXPECT_NE(failed.message().find("its generation is 101"), std::string::npos) << failed.message();
  EXPECT_EQ(only_result(2).failed_items, std::vector<std::uint32_t>{1});
  EXPECT_EQ(copier_->wait_layers(2, 1, 60s, 0).code(), Code::kAborted) << "ended and polled";

  SeqPoints::hold("copier.before_unit");
  SeqPointScope scope;
  ASSERT_TRUE(copier_->submit(layered_job(3, {0, 1})).ok());
  ASSERT_TRUE(copier_->submit(job(1, CopyDirection::kScatter, {2})).ok());  // an id that was layer by layer before
  EXPECT_EQ(copier_->wait_layers(1, 1, 60s, 0).code(), Code::kInvalidArgument);
  ASSERT_TRUE(SeqPoints::wait_until_reached("copier.before_unit", 60s));
  const std::uint64_t ids[] = {3};
  copier_->cancel(ids);
  SeqPoints::release("copier.before_unit");
  EXPECT_EQ(copier_->wait_layers(3, 1, 60s, 0).message().find("job 3 failed: "), 0u);
  const std::uint64_t both[] = {1, 3};
  ASSERT_TRUE(copier_->wait(both, 60s).ok());
  EXPECT_EQ(copier_->poll().size(), 2u);
  EXPECT_EQ(copier_->wait_layers(1, 1, 60s, 0).code(), Code::kNotFound);

  CopyJob store = layered_job(4, {0});
  store.direction = CopyDirection::kGather;
  EXPECT_EQ(copier_->submit(store).message(), "job 4: layer_by_layer is for loads, this is a store");
}

TEST_F(CopierJobs, TheLast1024JobsLayerByLayerAreKnownAfterTheirEnd) {
  std::vector<std::uint64_t> ids;
  for (std::uint64_t id = 0; id < 1030; ++id) {
    ASSERT_TRUE(copier_->submit(layered_job(id, {})).ok());
    ids.push_back(id);
  }
  ASSERT_TRUE(copier_->wait(ids, 60s).ok());
  EXPECT_EQ(copier_->wait_layers(5, 2, 0ms, 0).code(), Code::kNotFound);
  EXPECT_TRUE(copier_->wait_layers(6, 2, 60s, 0).ok());
  EXPECT_TRUE(copier_->wait_layers(1029, 2, 60s, 0).ok());
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

TEST_F(CopierJobs, AnIdMayBeUsedAgainAtOnce) {
  case_.options.threads = 3;
  copier_ = std::move(backend_->make(paged_->layout(), slot_, arena_->base(), arena_->bytes(), case_.options)).value();
  const std::uint64_t ids[] = {1};
  for (int i = 0; i < 400; ++i) {
    ASSERT_TRUE(copier_->submit(i % 2 == 0 ? layered_job(1, {0}) : job(1, CopyDirection::kScatter, {1})).ok());
    if (i % 2 == 0) {
      ASSERT_TRUE(copier_->wait_layers(1, 2, 60s, 0).ok());
    } else if (i % 3 == 0) {
      copier_->cancel(ids);
    }
    ASSERT_TRUE(copier_->wait(ids, 60s).ok());
    ASSERT_EQ(copier_->poll().size(), 1u);
  }
  EXPECT_EQ(loads_done(arena_->image(0), 1), 200u);
  EXPECT_EQ(loads_done(arena_->image(1), 1), 200u);
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
        if (i % 4 == 1) {
          ASSERT_TRUE(copier_->submit(layered_job(ids[0], {s})).ok());
          for (const std::uint32_t layers : {1u, 2u}) ASSERT_TRUE(copier_->wait_layers(ids[0], layers, 60s, 0).ok());
        } else {
          ASSERT_TRUE(copier_->submit(job(ids[0], i % 2 == 0 ? CopyDirection::kGather : CopyDirection::kScatter, {s})).ok());
        }
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

TEST_F(CopierJobs, RanksThatShareAPartLoadItAndOnlyTheFirstStores) {
  begin_slot(arena_->image(0), {}, {}, static_cast<std::uint64_t>(slot_.rank_bytes), 1, ArenaModel::generation(0));
  PagedModel other(*backend_, case_, kNumBlocks);
  other.fill(std::byte{0x5C});
  other.upload();
  const auto rank_of = [&](std::uint32_t rank, const PagedModel& pages) {
    CopierOptions options;
    options.rank = rank;
    options.replicated = true;
    return backend_->make(pages.layout(), slot_, arena_->base(), arena_->bytes(), options).value();
  };
  const auto ended = [](PagedCopier& copier, CopyJob job) {
    const std::uint64_t ids[] = {job.id};
    EXPECT_TRUE(copier.submit(std::move(job)).ok());
    EXPECT_TRUE(copier.wait(ids, 60s).ok());
    return copier.poll().at(0);
  };
  const auto first = rank_of(0, *paged_), last = rank_of(2, other);
  EXPECT_EQ(ended(*first, job(1, CopyDirection::kGather, {0})).message, "");
  EXPECT_EQ(rank_state(arena_->image(0), 0, ArenaModel::generation(0)), RankState::kOk);

  const Status refused = last->submit(job(2, CopyDirection::kGather, {0}));
  EXPECT_EQ(refused.code(), Code::kInvalidArgument);
  EXPECT_NE(refused.message().find("rank 2 stores nothing"), std::string::npos) << refused.message();
  EXPECT_EQ(rank_state(arena_->image(0), 2, ArenaModel::generation(0)), RankState::kEmpty);

  EXPECT_EQ(ended(*last, job(3, CopyDirection::kScatter, {0})).message, "");
  for (std::int64_t l = 0; l < case_.layers; ++l)
    for (std::int64_t p = 0; p < case_.planes; ++p)
      for (std::int64_t t = 0; t < 8; ++t)
        for (std::int64_t h = 0; h < case_.heads; ++h)
          for (std::int64_t d = 0; d < case_.head_dim; ++d)
            for (std::int64_t b = 0; b < case_.element_bytes; ++b)
              other.at(l, p, t / 4, t % 4, h, d, b) = paged_->at(l, p, t / 4, t % 4, h, d, b);
  EXPECT_EQ(other.compare(), "");
  EXPECT_EQ(loads_done(arena_->image(0), 2), 1u);
  EXPECT_EQ(loads_done(arena_->image(0), 0), 0u);

  const CopyDone of_parts = ended(*first, job(4, CopyDirection::kGather, {1}));
  EXPECT_NE(of_parts.message.find("in 3 parts, expected one of"), std::string::npos) << of_parts.message;
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

// multiprocessing forks an engine's process, and its child destroys what it inherited when it ends.
TEST_F(CopierJobs, AForkedChildHasNoCopier) {
  ASSERT_TRUE(copier_->submit(job(1, CopyDirection::kGather, {0, 1})).ok());
  const std::string name = copier_->name();
  const pid_t child = run_in_child([&] {
    const std::uint64_t ids[] = {1};
    const std::string refusal = "unavailable: the copier belongs to the parent process, a forked child cannot use it";
    if (copier_->submit(job(2, CopyDirection::kGather, {2})).to_string() != refusal) return 1;
    if (copier_->wait(ids, 60s).to_string() != refusal) return 2;
    if (copier_->wait_layers(1, 1, 60s, 0).to_string() != refusal) return 3;
    if (!copier_->poll().empty()) return 4;
    if (copier_->lost().to_string() != refusal) return 5;
    if (copier_->name() != name || "unavailable: " + copier_->details() != refusal) return 6;
    copier_->cancel(ids);
    copier_.reset();
    return 0;
  });
  EXPECT_EQ(exit_status(child), 0);
  EXPECT_TRUE(only_result(1).ok);
  EXPECT_TRUE(copier_->lost().ok());
  for (const std::size_t s : {0, 1}) expect_gathered(s);
  EXPECT_EQ(arena_->compare(), "");
}

}  // namespace
}  // namespace lmcn::copier_suite
