// What each eviction policy of the host tier makes of a trace, beside the best that any could do.
#include <charconv>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <sstream>

#include "report.hpp"

namespace {

using namespace lmcn::simulator;

constexpr const char* kUsage = R"(usage: simulator [OPTIONS]
what is replayed
  --trace FILE            a trace; without it one is made up
  --format NAME           mooncake (default) or bailian
  --chunk-blocks N        blocks of the trace in one chunk (default 1; a prompt's incomplete last chunk is left out when more)
  --seed N --requests N --zipf X --conversations-per-second X --system-prompts N --documents N --turns X --pause SECONDS
                          of the made-up trace (blocks of 512 tokens)
  --write-trace FILE      the trace in Mooncake's format; nothing is replayed
how
  --policies A,B          default LRU,S3FIFO,LFU,FIFO,MRU,OPTIMUM
  --capacities N,N        in chunks; default 1/128, 1/64, ... 1/2 and all of the different chunks
  --touch ORDER           forward (default, the store's) or backward: from a prompt's last chunk to its first
  --accesses-per-hit N    default 2, the store's: the lookup and the lease
output
  --json                  instead of table and chart
  --svg FILE              besides
)";

[[noreturn]] void stop(const std::string& message) {
  std::cerr << "simulator: " << message << '\n';
  std::exit(2);
}

template <class Number>
Number number(const std::string& option, const std::string& text) {
  Number value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || !(value > 0)) {
    stop(option + ": a number above 0 expected, got \"" + text + "\"");
  }
  return value;
}

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

std::ofstream created(const std::string& path) {
  std::ofstream file(path);
  if (!file) stop("cannot write " + path);
  return file;
}

}  // namespace

int main(int argc, char** argv) {
  Synthetic synthetic;
  ReplayOptions options;
  std::string trace_path, trace_output, svg_path;
  Format format = Format::kMooncake;
  std::uint32_t chunk_blocks = 1;
  std::vector<std::string> policies = {"LRU", "S3FIFO", "LFU", "FIFO", "MRU", "OPTIMUM"};
  Report report;
  bool json = false;

  using Value = const std::string&;
  const std::map<std::string, std::function<void(Value)>> with_value = {
      {"--trace", [&](Value v) { trace_path = v; }},
      {"--format",
       [&](Value v) {
         if (v != "mooncake" && v != "bailian") stop("--format: mooncake or bailian expected, got \"" + v + "\"");
         format = v == "bailian" ? Format::kBailian : Format::kMooncake;
       }},
      {"--chunk-blocks", [&](Value v) { chunk_blocks = number<std::uint32_t>("--chunk-blocks", v); }},
      {"--seed", [&](Value v) { synthetic.seed = number<std::uint64_t>("--seed", v); }},
      {"--requests", [&](Value v) { synthetic.requests = number<std::uint32_t>("--requests", v); }},
      {"--zipf", [&](Value v) { synthetic.zipf = number<double>("--zipf", v); }},
      {"--conversations-per-second",
       [&](Value v) { synthetic.conversations_per_second = number<double>("--conversations-per-second", v); }},
      {"--system-prompts", [&](Value v) { synthetic.system_prompts = number<std::uint32_t>("--system-prompts", v); }},
      {"--documents", [&](Value v) { synthetic.documents = number<std::uint32_t>("--documents", v); }},
      {"--turns", [&](Value v) { synthetic.mean_turns = number<double>("--turns", v); }},
      {"--pause", [&](Value v) { synthetic.mean_pause_seconds = number<double>("--pause", v); }},
      {"--write-trace", [&](Value v) { trace_output = v; }},
      {"--policies", [&](Value v) { policies = split(v); }},
      {"--capacities",
       [&](Value v) {
         for (const std::string& part : split(v)) report.capacities.push_back(number<std::uint64_t>("--capacities", part));
       }},
      {"--touch",
       [&](Value v) {
         if (v != "forward" && v != "backward") stop("--touch: forward or backward expected, got \"" + v + "\"");
         options.touch = v == "backward" ? Touch::kBackward : Touch::kForward;
       }},
      {"--accesses-per-hit", [&](Value v) { options.accesses_per_hit = number<std::uint32_t>("--accesses-per-hit", v); }},
      {"--svg", [&](Value v) { svg_path = v; }},
  };
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    if (option == "--help") {
      std::cout << kUsage;
      return 0;
    }
    if (option == "--json") {
      json = true;
      continue;
    }
    const auto known = with_value.find(option);
    if (known == with_value.end()) stop("unknown option " + option + "; see --help");
    if (i + 1 == argc) stop(option + " needs a value");
    known->second(argv[++i]);
  }

  Trace trace;
  if (trace_path.empty()) {
    trace = make_trace(synthetic);
    report.trace = "made-up trace, seed " + std::to_string(synthetic.seed);
  } else {
    std::ifstream file(trace_path);
    if (!file) stop("cannot read " + trace_path);
    auto read = read_trace(file, format);
    if (!read.ok()) stop(trace_path + ", " + read.status().message());
    trace = std::move(read).value();
    report.trace = trace_path;
  }
  if (!trace_output.empty()) {
    std::ofstream file = created(trace_output);
    write_trace(file, trace);
    return file.flush() ? 0 : 1;
  }

  const Chunks chunks = make_chunks(trace, chunk_blocks);
  if (chunks.total == 0) stop("no request has a whole chunk: see --chunk-blocks");
  report.requests = trace.size();
  report.chunks = chunks.total;
  report.different = chunks.different;
  if (report.capacities.empty()) {
    for (std::uint32_t part = 128; part > 0; part /= 2) report.capacities.push_back(std::max(1u, chunks.different / part));
  }
  std::sort(report.capacities.begin(), report.capacities.end());
  for (const std::string& policy : policies) {
    Curve& curve = report.curves.emplace_back(policy);
    for (const std::uint64_t capacity : report.capacities) {
      options.capacity_chunks = capacity;
      if (policy == "OPTIMUM") {
        curve.outcomes.push_back(replay_optimum(chunks, capacity));
        continue;
      }
      const auto outcome = replay(chunks, policy, options);
      if (!outcome.ok()) stop("--policies: " + outcome.status().message());
      curve.outcomes.push_back(*outcome);
    }
  }
  if (json) {
    write_json(std::cout, report);
  } else {
    write_table(std::cout, report);
    write_chart(std::cout, report);
  }
  if (!svg_path.empty()) {
    std::ofstream file = created(svg_path);
    write_svg(file, report);
    if (!file.flush()) stop("cannot write " + svg_path);
  }
  return std::cout.flush() ? 0 : 1;
}
