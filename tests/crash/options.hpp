// Command line of crash_test, and how it speaks.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

namespace lmcn::crash {

struct Options {
  std::uint64_t rounds = 0;
  std::uint64_t seed = 1;
  bool json = false;                // one line with the result on stdout, progress on stderr
  std::filesystem::path directory;  // where stores are made
};

}  // namespace lmcn::crash
