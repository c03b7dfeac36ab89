// The region log on a device that loses power: every image that can be left behind is opened and judged.
#pragma once

#include "options.hpp"

namespace lmcn::crash {

/// Makes options.rounds images. 0: all held. Prints the seed of the world that failed and keeps the image otherwise.
int run_power_cuts(const Options& options);

}  // namespace lmcn::crash
