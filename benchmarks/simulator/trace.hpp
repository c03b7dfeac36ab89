// Requests as traces of blocks: read from the public formats, or made up.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <string>
#include <string_view>
#include <vector>

#include "lmcn/status.hpp"

namespace lmcn::simulator {

struct Request {
  double seconds = 0;  // since the trace began
  std::uint64_t input_tokens = 0, output_tokens = 0;
  std::vector<std::uint64_t> blocks;  // of the prompt, from its beginning; a block's number stands for its content
};
using Trace = std::vector<Request>;

/// kMooncake: lines of {"timestamp": milliseconds, "input_length", "output_length", "hash_ids": [...]}, as the FAST'25 traces of
/// Mooncake (512 tokens a block). kBailian: lines of {"chat_id", "parent_chat_id", "timestamp": seconds, "input_length",
/// "output_length", "type", "turn", "hash_ids": [...]}, as Alibaba's qwen-bailian usage traces (16 tokens a block). Fields not
/// needed are passed over.
enum class Format : std::uint8_t { kMooncake, kBailian };

/// In the order of time; requests of one time stay in the order of lines. kInvalidArgument names the line and what is wrong with
/// it.
Result<Trace> read_trace(std::istream& input, Format format);
/// In Mooncake's format; blocks must be below 2^63.
void write_trace(std::ostream& output, const Trace& trace);

/// What a made-up trace is made of. Conversations begin as a Poisson process. Each has a system prompt and, sometimes, a document,
/// both chosen by Zipf's law from a fixed number, then turns: each sends all of the previous turn, its answer and a new question.
struct Synthetic {
  std::uint64_t seed = 1;
  std::uint32_t requests = 20'000;
  double conversations_per_second = 2;
  std::uint32_t system_prompts = 20, documents = 2'000;
  double zipf = 1.0;                 // exponent: popularity of rank r is 1 / r^zipf
  double with_document = 0.4;        // part of the conversations
  double mean_turns = 4;             // geometric, at least 1
  double mean_pause_seconds = 60;    // exponential, from one turn to the next
  double mean_system_tokens = 1500;  // these exponential too, per prompt, document, question or answer
  double mean_document_tokens = 8000;
  double mean_question_tokens = 300, mean_answer_tokens = 400;
  std::uint32_t block_tokens = 512;
};

/// The same for the same options, on any machine.
Trace make_trace(const Synthetic& options);

}  // namespace lmcn::simulator
