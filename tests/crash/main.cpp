// crash_test kill|power-cut [--rounds N] [--seed S] [--json] [--directory D]
#include <charconv>
#include <cstdio>
#include <cstring>
#include <exception>
#include <string_view>

#include "kill_rounds.hpp"
#include "power_cut.hpp"

namespace {

constexpr const char* kUsage =
    "usage: crash_test kill|power-cut [--rounds N] [--seed S] [--json] [--directory D]\n"
    "kill: SIGKILLs a writing store N times; each time whatever is found afterwards must be right.\n"
    "power-cut: N images of what a power cut can leave of a region log; each is opened and judged. The same seed does the same.\n"
    "--directory: where the stores are made, default the temporary directory; /dev/shm for power-cut where it is. A store that "
    "failed is kept.\n";

bool parse(int argc, char** argv, lmcn::crash::Options& options) {
  const auto number = [](const char* text, std::uint64_t& value) {
    const char* const end = text + std::strlen(text);
    const auto [stop, error] = std::from_chars(text, end, value);
    return error == std::errc() && stop == end;
  };
  for (int i = 2; i < argc; ++i) {
    const std::string_view name = argv[i];
    if (name == "--json") {
      options.json = true;
      continue;
    }
    if (++i == argc) return false;
    if (name == "--directory") {
      options.directory = argv[i];
    } else if (name == "--rounds") {
      if (!number(argv[i], options.rounds) || options.rounds == 0) return false;
    } else if (name == "--seed") {
      if (!number(argv[i], options.seed)) return false;
    } else {
      return false;
    }
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  lmcn::crash::Options options;
  const std::string_view test = argc > 1 ? argv[1] : "";
  const bool power_cut = test == "power-cut";
  options.rounds = power_cut ? 20'000 : 1000;
  options.directory = power_cut && std::filesystem::exists("/dev/shm") ? "/dev/shm" : std::filesystem::temp_directory_path();
  if ((test != "kill" && !power_cut) || !parse(argc, argv, options)) {
    std::fputs(kUsage, stderr);
    return 2;
  }
  try {
    return power_cut ? lmcn::crash::run_power_cuts(options) : lmcn::crash::run_kill_rounds(options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "crash_test: %s\n", error.what());
    return 2;
  }
}
