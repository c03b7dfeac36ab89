// Random scripts on three disks; a script that fails is made as small as it can be and printed.
// LMCN_MODEL_SCRIPTS and LMCN_MODEL_SEED in the environment: how many scripts each test plays, and which is the first.
#include <gtest/gtest.h>
#include <stdlib.h>

#include <algorithm>
#include <cstdlib>
#include <string>

#include "model/player.hpp"

namespace lmcn::model {
namespace {

constexpr std::size_t kSteps = 200;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr std::uint64_t kScripts = 8;
#else
constexpr std::uint64_t kScripts = 24;
#endif

std::uint64_t from_environment(const char* name, std::uint64_t otherwise) {
  const char* const text = std::getenv(name);
  return text == nullptr ? otherwise : std::stoull(text);
}

World world_of(DiskKind disk, std::uint64_t seed) {
  std::string pattern = (std::filesystem::temp_directory_path() / "lmcn_model_XXXXXX").string();
  if (::mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("mkdtemp " + pattern);
  World world;
  world.disk = disk;
  world.seed = static_cast<std::uint32_t>(seed);
  world.host_bytes = (seed % 3 == 0 ? 16ull : 4ull) << 20;
  world.nvme_bytes = (seed % 4 < 2 ? 64ull : 6ull) << 20;
  world.directory = std::filesystem::path(pattern) / "store";
  return world;
}

class Model : public testing::TestWithParam<DiskKind> {};

TEST_P(Model, AnswersAreThoseOfATable) {
  const std::uint64_t first = from_environment("LMCN_MODEL_SEED", 1);
  const std::uint64_t count = from_environment("LMCN_MODEL_SCRIPTS", kScripts);
  Played played;
  for (std::uint64_t seed = first; seed < first + count; ++seed) {
    const World world = world_of(GetParam(), seed);
    const Script script = random_script(seed, kSteps);
    const auto wrong = play(world, script, played);
    if (wrong) {
      const auto fails = [&](const Script& candidate) { return play(world, candidate, played); };
      const Script smallest = shrink(script, fails, 1000, 3);
      const auto smallest_wrong = fails(smallest);
      ADD_FAILURE() << "seed " << seed << ", host " << world.host_bytes << " bytes, NVMe " << world.nvme_bytes
                    << " bytes: " << *wrong << "\nthe smallest script found that fails (" << smallest.size()
                    << " steps): " << smallest_wrong.value_or("not at each run") << "\n"
                    << to_text(smallest);
    }
    std::filesystem::remove_all(world.directory.parent_path());
    if (wrong) return;
  }
  if (count < kScripts) return;
  // Something was at stake.
  EXPECT_GT(played.hits, 40 * count);
  EXPECT_GT(played.must_hits, 10 * count);
  EXPECT_GT(played.kills, 0u);
  EXPECT_GT(played.reopens, 0u);
  EXPECT_GT(played.reclaims, 0u);
  if (GetParam() == DiskKind::kFaulty) {
    EXPECT_GT(played.faults, count);
  }
  RecordProperty("must_hits", static_cast<int>(played.must_hits));
  RecordProperty("reclaims", static_cast<int>(played.reclaims));
  RecordProperty("kills", static_cast<int>(played.kills));
}

INSTANTIATE_TEST_SUITE_P(OnADisk, Model, testing::Values(DiskKind::kMemory, DiskKind::kFaulty, DiskKind::kFile),
                         [](const auto& kind) {
                           return kind.param == DiskKind::kMemory ? "Memory" : kind.param == DiskKind::kFaulty ? "Faulty" : "File";
                         });

TEST(Shrink, LeavesOnlyTheStepsThatMatter) {
  Script script = random_script(5, 200);
  script[31] = {Action::kPut, 7, 1, 0};
  script[160] = {Action::kErase, 7, 1, 0};
  const auto at = [](const Script& s, Action action) {
    return std::find_if(s.begin(), s.end(), [&](const Step& step) { return step.action == action && step.id == 7; });
  };
  const auto fails = [&](const Script& s) -> std::optional<std::string> {
    const auto put = at(s, Action::kPut);
    const auto erase = at(s, Action::kErase);
    return erase != s.end() && put < erase ? std::optional<std::string>("both are there") : std::nullopt;
  };
  const Script smallest = shrink(script, fails, 10'000, 1);
  ASSERT_EQ(smallest.size(), 2u) << to_text(smallest);
  EXPECT_EQ(smallest[0].action, Action::kPut);
  EXPECT_EQ(smallest[1].action, Action::kErase);
  EXPECT_EQ(to_text({script[31]}), "    {Action::kPut, 7, 1, 0},\n");
}

}  // namespace
}  // namespace lmcn::model
