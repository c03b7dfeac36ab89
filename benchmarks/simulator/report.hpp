// Hit rates over capacities, for people and for programs.
#pragma once

#include <iosfwd>
#include <string>
#include <vector>

#include "replay.hpp"

namespace lmcn::simulator {

struct Curve {
  std::string policy;
  std::vector<Outcome> outcomes;  // by capacity
};
struct Report {
  std::string trace;  // what was replayed, for headings
  std::uint64_t requests = 0, chunks = 0, different = 0;
  std::vector<std::uint64_t> capacities;  // ascending
  std::vector<Curve> curves;
  double hit_rate(const Outcome& outcome) const {
    return chunks == 0 ? 0 : static_cast<double>(outcome.hits) / static_cast<double>(chunks);
  }
};

void write_table(std::ostream& output, const Report& report);
/// Hit rate upwards, capacities from left to right at equal distances. A letter for each curve; where two meet, the later one's.
void write_chart(std::ostream& output, const Report& report);
void write_json(std::ostream& output, const Report& report);
void write_svg(std::ostream& output, const Report& report);

}  // namespace lmcn::simulator
