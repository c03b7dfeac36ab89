// Kills a writing store again and again; after each kill somebody opens the directory and judges it.
#pragma once

#include "options.hpp"

namespace lmcn::crash {

/// 0: every round held. Prints the failing round and keeps the directory otherwise.
int run_kill_rounds(const Options& options);

}  // namespace lmcn::crash
