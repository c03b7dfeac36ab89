#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <list>
#include <map>
#include <random>
#include <set>
#include <sstream>

#include "report.hpp"

namespace lmcn::simulator {
namespace {

Trace must_read(const std::string& text, Format format) {
  std::istringstream stream(text);
  auto trace = read_trace(stream, format);
  EXPECT_TRUE(trace.ok()) << trace.status().message();
  return trace.ok() ? std::move(trace).value() : Trace{};
}

std::string refusal(const std::string& text, Format format = Format::kMooncake) {
  std::istringstream stream(text);
  const auto trace = read_trace(stream, format);
  return trace.ok() ? "" : trace.status().message();
}

constexpr const char* kGood = R"({"timestamp": 0, "input_length": 1, "output_length": 2, "hash_ids": [3]})";

TEST(ReadTrace, Mooncake) {
  const Trace trace = must_read(
      "{\"timestamp\": 27482, \"input_length\": 6955, \"output_length\": 52, \"hash_ids\": [46, 47, 2366]}\r\n\n"
      "{\"timestamp\":1500.5,\"hash_ids\":[],\"input_length\":0}",
      Format::kMooncake);
  ASSERT_EQ(trace.size(), 2u);
  EXPECT_DOUBLE_EQ(trace[0].seconds, 1.5005);  // in the order of time
  EXPECT_TRUE(trace[0].blocks.empty());
  EXPECT_DOUBLE_EQ(trace[1].seconds, 27.482);
  EXPECT_EQ(trace[1].input_tokens, 6955u);
  EXPECT_EQ(trace[1].output_tokens, 52u);
  EXPECT_EQ(trace[1].blocks, (std::vector<std::uint64_t>{46, 47, 2366}));
}

TEST(ReadTrace, Bailian) {
  const Trace trace = must_read(
      R"({"chat_id": 159, "parent_chat_id": -1, "timestamp": 61.114, "input_length": 521, "output_length": 132, "type": "te\"xt",)"
      R"( "turn": 2, "more": {"a": [1, null, true, {"b": "c"}]}, "hash_ids": [1089, 18446744073709551615]})",
      Format::kBailian);
  ASSERT_EQ(trace.size(), 1u);
  EXPECT_DOUBLE_EQ(trace[0].seconds, 61.114);
  EXPECT_EQ(trace[0].blocks, (std::vector<std::uint64_t>{1089, 18446744073709551615u}));
}

TEST(ReadTrace, AnErrorNamesTheLineAndWhatIsWrong) {
  const std::string good = std::string(kGood) + "\n";
  EXPECT_EQ(refusal(""), "the trace has no requests");
  EXPECT_EQ(refusal(good + good + "timestamp,input_length\n"), "line 3: expected '{', got \"timestamp,input_leng\"");
  EXPECT_EQ(refusal(good + "\n{\"timestamp\": 1, \"input_length\": 2}"), "line 3: \"hash_ids\" is missing");
  EXPECT_EQ(refusal("{\"input_length\": 2, \"hash_ids\": []}"), "line 1: \"timestamp\" is missing");
  EXPECT_EQ(refusal("{\"timestamp\": 2, \"hash_ids\": []}"), "line 1: \"input_length\" is missing");
  EXPECT_EQ(refusal("{\"timestamp\": -2, \"input_length\": 1, \"hash_ids\": []}"), "line 1: \"timestamp\": expected a number >= 0");
  EXPECT_EQ(refusal("{\"timestamp\": 1, \"input_length\": 2, \"hash_ids\": [1, \"a\"]}"),
            "line 1: \"hash_ids\": expected a number, got \"\"a\"]}\"");
  EXPECT_EQ(refusal("{\"timestamp\": 1, \"input_length\": 2, \"hash_ids\": [1.5]}"),
            "line 1: \"hash_ids\": expected a whole number, got \".5]}\"");
  EXPECT_EQ(refusal("{\"timestamp\": 1, \"input_length\": -2, \"hash_ids\": []}"),
            "line 1: \"input_length\": expected a number, got \"-2, \"hash_ids\": []}\"");
  EXPECT_EQ(refusal(good + R"({"timestamp": 1, "input_length": 2, "hash_ids": [1, 2)"),
            "line 2: \"hash_ids\": expected ']', the line ends");
  EXPECT_EQ(refusal(std::string(kGood) + " x"), "line 1: expected the end of the line, got \"x\"");
  EXPECT_EQ(refusal("{\"timestamp"), "line 1: expected the end of a string, the line ends");
}

bool same(const Trace& a, const Trace& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const Request& x, const Request& y) {
    return std::abs(x.seconds - y.seconds) < 0.001 && x.input_tokens == y.input_tokens && x.output_tokens == y.output_tokens &&
           x.blocks == y.blocks;
  });
}

Synthetic small(std::uint64_t seed, std::uint32_t requests = 2000) {
  Synthetic options;
  options.seed = seed;
  options.requests = requests;
  options.documents = 50;
  return options;
}

TEST(MakeTrace, IsTheSameForOneSeedAndSurvivesItsFile) {
  const Trace trace = make_trace(small(3));
  EXPECT_TRUE(same(trace, make_trace(small(3))));
  EXPECT_FALSE(same(trace, make_trace(small(4))));
  std::stringstream file;
  write_trace(file, trace);
  EXPECT_TRUE(same(trace, must_read(file.str(), Format::kMooncake)));
}

// tests/data/generated_trace.jsonl is the generator's own, not a recording of users.
TEST(MakeTrace, MakesTheFileInTestsData) {
  Synthetic options;
  options.seed = 7;
  options.requests = 60;
  options.documents = 20;
  options.system_prompts = 4;
  std::ifstream file(LMCN_TEST_DATA "/generated_trace.jsonl");
  std::ostringstream expected, made;
  expected << file.rdbuf();
  write_trace(made, make_trace(options));
  ASSERT_FALSE(expected.str().empty());
  EXPECT_EQ(made.str(), expected.str());
}

TEST(MakeTrace, TurnsExtendEarlierOnesAndPopularPartsAreShared) {
  const Trace trace = make_trace(small(5));
  std::map<std::uint64_t, int> first_blocks;
  std::map<std::vector<std::uint64_t>, int> seen;
  double last = 0;
  int extends = 0;
  for (const Request& request : trace) {
    EXPECT_GE(request.seconds, last);
    last = request.seconds;
    ASSERT_EQ(request.blocks.size(), (request.input_tokens + 511) / 512);
    ++first_blocks[request.blocks.front()];
    const std::size_t whole = request.input_tokens / 512;
    std::vector<std::uint64_t> prefix(request.blocks.begin(), request.blocks.begin() + static_cast<std::ptrdiff_t>(whole));
    for (; !prefix.empty() && !seen.contains(prefix); prefix.pop_back()) continue;
    if (prefix.size() >= 2) ++extends;
    for (prefix.assign(request.blocks.begin(), request.blocks.begin() + static_cast<std::ptrdiff_t>(whole)); !prefix.empty();
         prefix.pop_back()) {
      ++seen[prefix];
    }
  }
  EXPECT_GT(extends, 1000);
  int most = 0;
  for (const auto& [block, count] : first_blocks) most = std::max(most, count);
  EXPECT_GT(most, 100);
}

TEST(MakeChunks, EqualOnlyWithEqualPrefixesAndIncompleteOnesAreLeftOut) {
  const Trace trace = {{0, 0, 0, {1, 2, 3, 4, 5}}, {1, 0, 0, {1, 2, 9, 4, 5}}, {2, 0, 0, {2}}};
  EXPECT_EQ(make_chunks(trace, 1).requests, (std::vector<std::vector<std::uint32_t>>{{0, 1, 2, 3, 4}, {0, 1, 5, 6, 7}, {8}}));
  const Chunks pairs = make_chunks(trace, 2);
  EXPECT_EQ(pairs.requests, (std::vector<std::vector<std::uint32_t>>{{0, 1}, {0, 2}, {}}));
  EXPECT_EQ(pairs.total, 4u);
  EXPECT_EQ(pairs.different, 3u);
}

/// LRU as one would write it down: hits to the first chunk that is not there; those in use are not evicted but become the newest.
Outcome plain_lru(const Chunks& chunks, std::size_t capacity) {
  std::list<std::uint32_t> order;  // oldest first
  Outcome outcome;
  const auto newest = [&](std::uint32_t chunk) {
    order.remove(chunk);
    order.push_back(chunk);
  };
  for (const auto& request : chunks.requests) {
    std::set<std::uint32_t> used;
    std::size_t i = 0;
    for (; i < request.size() && std::find(order.begin(), order.end(), request[i]) != order.end(); ++i) {
      ++outcome.hits;
      used.insert(request[i]);
      newest(request[i]);
    }
    for (; i < request.size(); ++i) {
      const bool there = std::find(order.begin(), order.end(), request[i]) != order.end();
      if (!there && order.size() == capacity) {
        std::size_t looked = 0;
        while (looked < order.size() && used.contains(order.front())) newest(order.front()), ++looked;
        if (looked == order.size()) break;
        order.pop_front();
        ++outcome.evictions;
      }
      used.insert(request[i]);
      newest(request[i]);
    }
  }
  return outcome;
}

TEST(Replay, LruIsWhatAPlainLruIs) {
  for (const std::uint64_t seed : {1u, 2u, 3u}) {
    const Chunks chunks = make_chunks(make_trace(small(seed, 400)), 1);
    for (const std::uint64_t capacity : {1u, 7u, 50u, 300u, 1000u}) {
      const Outcome plain = plain_lru(chunks, capacity);
      const Outcome real = replay(chunks, "LRU", {.capacity_chunks = capacity}).value();
      EXPECT_EQ(real.hits, plain.hits) << capacity;
      EXPECT_EQ(real.evictions, plain.evictions) << capacity;
    }
  }
}

TEST(Replay, WithRoomForAllEachPolicyHasAllHitsOfTheOptimum) {
  const Chunks chunks = make_chunks(make_trace(small(1)), 1);
  const std::uint64_t all = replay_optimum(chunks, chunks.different).hits;
  EXPECT_EQ(all, chunks.total - chunks.different);
  for (const char* policy : {"LRU", "S3FIFO", "LFU", "FIFO", "MRU"}) {
    const Outcome outcome = replay(chunks, policy, {.capacity_chunks = chunks.different}).value();
    EXPECT_EQ(outcome.hits, all) << policy;
    EXPECT_EQ(outcome.evictions, 0u) << policy;
  }
  EXPECT_FALSE(replay(chunks, "CLOCK", {.capacity_chunks = 1}).ok());
}

TEST(Replay, NoPolicyHasMoreHitsThanTheOptimum) {
  for (const std::uint64_t seed : {1u, 2u}) {
    const Chunks chunks = make_chunks(make_trace(small(seed)), 1);
    for (const std::uint64_t capacity : {20u, 200u, 1500u}) {
      const std::uint64_t best = replay_optimum(chunks, capacity).hits;
      for (const char* policy : {"LRU", "S3FIFO", "LFU", "FIFO", "MRU"}) {
        for (const Touch touch : {Touch::kForward, Touch::kBackward}) {
          EXPECT_LE(replay(chunks, policy, {.capacity_chunks = capacity, .touch = touch}).value().hits, best) << policy;
        }
      }
    }
  }
}

/// The most hits that any choice of what to keep can have, by trying all.
std::uint64_t best_of_all(const Chunks& chunks, std::size_t at, std::size_t capacity, const std::set<std::uint32_t>& held) {
  if (at == chunks.requests.size()) return 0;
  const auto& request = chunks.requests[at];
  std::uint64_t hits = 0;
  while (hits < request.size() && held.contains(request[hits])) ++hits;
  std::set<std::uint32_t> all = held;
  all.insert(request.begin(), request.end());
  const std::vector<std::uint32_t> choices(all.begin(), all.end());
  std::uint64_t best = 0;
  for (std::uint32_t kept = 0; kept < 1u << choices.size(); ++kept) {
    if (static_cast<std::size_t>(__builtin_popcount(kept)) != std::min(capacity, choices.size())) continue;
    std::set<std::uint32_t> next;
    for (std::size_t i = 0; i < choices.size(); ++i) {
      if ((kept >> i & 1) != 0) next.insert(choices[i]);
    }
    best = std::max(best, best_of_all(chunks, at + 1, capacity, next));
  }
  return hits + best;
}

TEST(ReplayOptimum, IsTheBestOfAllChoices) {
  std::mt19937_64 random(1);
  for (int round = 0; round < 40; ++round) {
    Trace trace;
    for (int i = 0; i < 6; ++i) {
      Request& request = trace.emplace_back();
      for (std::uint64_t length = 1 + random() % 2; length > 0; --length) request.blocks.push_back(random() % 2);
    }
    const Chunks chunks = make_chunks(trace, 1);
    for (const std::size_t capacity : {1u, 2u, 3u}) {
      EXPECT_EQ(replay_optimum(chunks, capacity).hits, best_of_all(chunks, 0, capacity, {})) << round << ", " << capacity;
    }
  }
}

TEST(Report, SaysTheSameInEachForm) {
  Report report{"a <trace>", 10,
                200,         50,
                {8, 64},     {{"LRU", {{20, 5}, {100, 1}}}, {"LFU", {{30, 5}, {100, 1}}}, {"OPTIMUM", {{40, 0}, {150, 0}}}}};
  std::ostringstream table, chart, json, svg;
  write_table(table, report);
  write_chart(chart, report);
  write_json(json, report);
  write_svg(svg, report);
  EXPECT_NE(table.str().find("          64     50.00     50.00     75.00\n"), std::string::npos) << table.str();
  EXPECT_NE(chart.str().find("L = LRU F = LFU * = OPTIMUM"), std::string::npos) << chart.str();
  EXPECT_NE(chart.str().find("LF"), std::string::npos) << "two that meet hide each other";
  EXPECT_NE(json.str().find(R"({"policy": "LFU", "capacity_chunks": 8, "hits": 30, "hit_rate": 0.150000, "evictions": 5})"),
            std::string::npos)
      << json.str();
  EXPECT_NE(svg.str().find("a &lt;trace>"), std::string::npos);
  EXPECT_NE(svg.str().find("OPTIMUM</text>\n</svg>\n"), std::string::npos);
}

}  // namespace
}  // namespace lmcn::simulator
