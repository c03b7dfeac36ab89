#include <algorithm>
#include <cmath>
#include <queue>
#include <random>
#include <unordered_map>

#include "trace.hpp"

namespace lmcn::simulator {
namespace {

/// The standard's engine, but not its distributions: these differ between libraries.
class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}
  double uniform() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }  // [0, 1)
  double exponential(double mean) { return -mean * std::log1p(-uniform()); }
  std::uint64_t tokens(double mean) { return 1 + static_cast<std::uint64_t>(exponential(mean)); }

 private:
  std::mt19937_64 engine_;
};

class Zipf {
 public:
  Zipf(std::uint32_t count, double exponent) {
    double sum = 0;
    for (std::uint32_t rank = 1; rank <= count; ++rank) sums_.push_back(sum += std::pow(rank, -exponent));
  }
  std::size_t draw(Random& random) const {
    const auto at = std::upper_bound(sums_.begin(), sums_.end(), random.uniform() * sums_.back());
    return std::min(static_cast<std::size_t>(at - sums_.begin()), sums_.size() - 1);
  }

 private:
  std::vector<double> sums_;
};

/// Tokens that belong together: a system prompt, a document, a question or an answer.
struct Part {
  std::uint64_t id;
  std::uint64_t tokens;
};

struct Turn {
  double seconds;
  std::uint64_t number;  // order of what comes at one time
  std::vector<Part> parts;
  bool operator>(const Turn& other) const { return seconds != other.seconds ? seconds > other.seconds : number > other.number; }
};

std::uint64_t mix(std::uint64_t hash, std::uint64_t value) {
  hash = (hash ^ value) * 0x9E37'79B9'7F4A'7C15;
  return hash ^ (hash >> 29);
}

/// Numbers of blocks, given as they come up: equal prefixes have equal numbers. The last block may be a partial one.
class Blocks {
 public:
  std::vector<std::uint64_t> of(const std::vector<Part>& parts, std::uint64_t block_tokens) {
    std::vector<std::uint64_t> blocks;
    std::uint64_t hash = 1, filled = 0;
    for (const Part& part : parts) {
      for (std::uint64_t left = part.tokens; left > 0;) {
        const std::uint64_t step = std::min(left, block_tokens - filled);
        hash = mix(mix(hash, part.id), step);
        filled += step;
        left -= step;
        if (filled == block_tokens) {
          blocks.push_back(number(hash));
          filled = 0;
        }
      }
    }
    if (filled > 0) blocks.push_back(number(hash));
    return blocks;
  }

 private:
  std::uint64_t number(std::uint64_t hash) { return numbers_.try_emplace(hash, numbers_.size()).first->second; }
  std::unordered_map<std::uint64_t, std::uint64_t> numbers_;
};

}  // namespace

Trace make_trace(const Synthetic& options) {
  Random random(options.seed);
  std::uint64_t next_part = 0;
  const auto library = [&](std::uint32_t count, double mean_tokens) {
    std::vector<Part> parts;
    for (std::uint32_t i = 0; i < count; ++i) parts.push_back({next_part++, random.tokens(mean_tokens)});
    return parts;
  };
  const std::vector<Part> prompts = library(std::max(1u, options.system_prompts), options.mean_system_tokens);
  const std::vector<Part> documents = library(std::max(1u, options.documents), options.mean_document_tokens);
  const Zipf which_prompt(static_cast<std::uint32_t>(prompts.size()), options.zipf);
  const Zipf which_document(static_cast<std::uint32_t>(documents.size()), options.zipf);

  std::priority_queue<Turn, std::vector<Turn>, std::greater<>> coming;
  double next_conversation = 0;
  std::uint64_t turns = 0;
  Blocks blocks;
  Trace trace;
  while (trace.size() < options.requests) {
    if (coming.empty() || coming.top().seconds > next_conversation) {
      std::vector<Part> parts{prompts[which_prompt.draw(random)]};
      if (random.uniform() < options.with_document) parts.push_back(documents[which_document.draw(random)]);
      parts.push_back({next_part++, random.tokens(options.mean_question_tokens)});
      coming.push({next_conversation, turns++, std::move(parts)});
      next_conversation += random.exponential(1 / options.conversations_per_second);
      continue;
    }
    Turn turn = coming.top();
    coming.pop();
    Request request;
    request.seconds = turn.seconds;
    for (const Part& part : turn.parts) request.input_tokens += part.tokens;
    request.output_tokens = random.tokens(options.mean_answer_tokens);
    request.blocks = blocks.of(turn.parts, options.block_tokens);
    if (random.uniform() >= 1 / options.mean_turns) {
      turn.parts.push_back({next_part++, request.output_tokens});
      turn.parts.push_back({next_part++, random.tokens(options.mean_question_tokens)});
      turn.seconds += random.exponential(options.mean_pause_seconds);
      turn.number = turns++;
      coming.push(std::move(turn));
    }
    trace.push_back(std::move(request));
  }
  return trace;
}

}  // namespace lmcn::simulator
