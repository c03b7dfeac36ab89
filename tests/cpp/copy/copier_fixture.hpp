// Four slots of one small chunk each, and a copier of the executable's backend.
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <stdexcept>

#include "copier_suite.hpp"
#include "memory/slot_image.hpp"

namespace lmcn::copier_suite {

using namespace std::chrono_literals;

class CopierFixture : public testing::Test {
 protected:
  static constexpr std::size_t kSlots = 4;
  static constexpr std::int64_t kNumBlocks = 10;

  CopierFixture() {
    case_ = {.layers = 2, .block_tokens = 4, .chunk_tokens = 8};
    case_.options.rank = 1;
    backend_ = make_backend();
    paged_ = std::make_unique<PagedModel>(*backend_, case_, kNumBlocks);
    std::mt19937_64 random(3);
    paged_->fill_random(random);
    paged_->upload();
    slot_ = SlotLayout::make(paged_->layout(), case_.chunk_tokens).value();
    arena_ = std::make_unique<ArenaModel>(*backend_, case_, slot_, kSlots);
    auto made = backend_->make(paged_->layout(), slot_, arena_->base(), arena_->bytes(), case_.options);
    if (!made.ok()) throw std::runtime_error(made.status().to_string());
    copier_ = std::move(made).value();
  }

  /// Slot s <-> blocks 2s, 2s+1.
  CopyItem item(std::size_t slot, std::uint32_t index_of_item = 0) const {
    return {.slot_offset = arena_->offset(slot),
            .generation = ArenaModel::generation(slot),
            .tokens = 8,
            .block_begin = 2 * index_of_item};
  }
  CopyJob job(std::uint64_t id, CopyDirection direction, const std::vector<std::size_t>& slots) const {
    CopyJob made{.id = id, .direction = direction};
    for (const std::size_t s : slots) {
      made.items.push_back(item(s, static_cast<std::uint32_t>(made.items.size())));
      made.block_ids.insert(made.block_ids.end(), {static_cast<std::int64_t>(2 * s), static_cast<std::int64_t>(2 * s + 1)});
    }
    return made;
  }
  void expect_gathered(std::size_t slot) {
    for (std::int64_t l = 0; l < case_.layers; ++l)
      for (std::int64_t p = 0; p < case_.planes; ++p)
        for (std::int64_t t = 0; t < 8; ++t)
          for (std::int64_t h = 0; h < case_.heads; ++h)
            for (std::int64_t d = 0; d < case_.head_dim; ++d)
              for (std::int64_t b = 0; b < case_.element_bytes; ++b)
                arena_->expected(slot, 1, l, p, t, h, d, b) =
                    paged_->at(l, p, 2 * static_cast<std::int64_t>(slot) + t / 4, t % 4, h, d, b);
  }
  void expect_loaded(std::size_t slot, std::int64_t layer) {
    for (std::int64_t p = 0; p < case_.planes; ++p)
      for (std::int64_t t = 0; t < 8; ++t)
        for (std::int64_t h = 0; h < case_.heads; ++h)
          for (std::int64_t d = 0; d < case_.head_dim; ++d)
            for (std::int64_t b = 0; b < case_.element_bytes; ++b)
              paged_->at(layer, p, 2 * static_cast<std::int64_t>(slot) + t / 4, t % 4, h, d, b) =
                  arena_->expected(slot, 1, layer, p, t, h, d, b);
  }
  CopyJob layered_job(std::uint64_t id, const std::vector<std::size_t>& slots) const {
    CopyJob made = job(id, CopyDirection::kScatter, slots);
    made.layer_by_layer = true;
    return made;
  }
  CopyDone only_result(std::uint64_t id) {
    const std::uint64_t ids[] = {id};
    EXPECT_TRUE(copier_->wait(ids, 60s).ok());
    std::vector<CopyDone> done = copier_->poll();
    EXPECT_EQ(done.size(), 1u);
    if (done.empty()) return {};
    EXPECT_EQ(done[0].id, id);
    return done[0];
  }
  RankState state(std::size_t slot) { return rank_state(arena_->image(slot), 1, ArenaModel::generation(slot)); }

  Case case_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<PagedModel> paged_;
  SlotLayout slot_;
  std::unique_ptr<ArenaModel> arena_;
  std::unique_ptr<PagedCopier> copier_;
};

}  // namespace lmcn::copier_suite
