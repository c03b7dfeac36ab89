#include "report.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <iomanip>
#include <ostream>

namespace lmcn::simulator {
namespace {

/// For JSON, and good for XML when none of its own characters are in it.
std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') result.push_back('\\');
    result.push_back(static_cast<unsigned char>(c) < 0x20 ? ' ' : c);
  }
  return result + '"';
}

std::string xml(const std::string& text) {
  std::string result;
  for (const char c : text) {
    if (c == '<') {
      result += "&lt;";
    } else if (c == '&') {
      result += "&amp;";
    } else {
      result.push_back(c);
    }
  }
  return result;
}

/// "OPTIMUM" is '*'; two policies of one first letter: the later takes its second.
std::vector<char> letters(const Report& report) {
  std::vector<char> taken;
  for (const Curve& curve : report.curves) {
    char letter = '*';
    if (curve.policy != "OPTIMUM") {
      const auto free = std::find_if(curve.policy.begin(), curve.policy.end(),
                                     [&](char c) { return std::find(taken.begin(), taken.end(), c) == taken.end(); });
      letter = free == curve.policy.end() ? '?' : *free;
    }
    taken.push_back(letter);
  }
  return taken;
}

}  // namespace

void write_table(std::ostream& output, const Report& report) {
  output << report.trace << ": " << report.requests << " requests, " << report.chunks << " chunks, " << report.different
         << " different\nhit rate in %, counted to the first chunk that is not there\n"
         << std::setw(12) << "capacity";
  for (const Curve& curve : report.curves) output << std::setw(10) << curve.policy;
  output << '\n' << std::fixed << std::setprecision(2);
  for (std::size_t i = 0; i < report.capacities.size(); ++i) {
    output << std::setw(12) << report.capacities[i];
    for (const Curve& curve : report.curves) output << std::setw(10) << 100 * report.hit_rate(curve.outcomes[i]);
    output << '\n';
  }
}

void write_chart(std::ostream& output, const Report& report) {
  constexpr int kRows = 20, kColumn = 8;
  double most = 0.01;
  for (const Curve& curve : report.curves) {
    for (const Outcome& outcome : curve.outcomes) most = std::max(most, report.hit_rate(outcome));
  }
  std::vector<std::string> rows(kRows + 1, std::string(report.capacities.size() * kColumn, ' '));
  const std::vector<char> letter = letters(report);
  for (std::size_t c = 0; c < report.curves.size(); ++c) {
    for (std::size_t i = 0; i < report.capacities.size(); ++i) {
      const auto row = static_cast<std::size_t>(std::lround(kRows * report.hit_rate(report.curves[c].outcomes[i]) / most));
      std::string& line = rows[kRows - row];
      std::size_t at = i * kColumn + kColumn / 2 - 2;
      while (line[at] != ' ' && at + 1 < (i + 1) * kColumn) ++at;  // those that meet stand side by side
      line[at] = letter[c];
    }
  }
  output << '\n' << std::fixed << std::setprecision(1);
  for (std::size_t row = 0; row < rows.size(); ++row) {
    if (row % 5 == 0) {
      output << std::setw(6) << 100 * most * static_cast<double>(kRows - row) / kRows << "% |";
    } else {
      output << "        |";
    }
    output << rows[row].substr(0, rows[row].find_last_not_of(' ') + 1) << '\n';
  }
  output << "        +" << std::string(report.capacities.size() * kColumn, '-') << "\n         ";
  for (const std::uint64_t capacity : report.capacities) output << std::setw(kColumn - 1) << capacity << ' ';
  output << "chunks\n        ";
  for (std::size_t c = 0; c < report.curves.size(); ++c) output << ' ' << letter[c] << " = " << report.curves[c].policy;
  output << '\n';
}

void write_json(std::ostream& output, const Report& report) {
  output << "{\"trace\": " << quoted(report.trace) << ", \"requests\": " << report.requests << ", \"chunks\": " << report.chunks
         << ", \"different_chunks\": " << report.different << ", \"results\": [";
  const char* separator = "";
  for (const Curve& curve : report.curves) {
    for (std::size_t i = 0; i < report.capacities.size(); ++i) {
      const Outcome& outcome = curve.outcomes[i];
      output << separator << "\n  {\"policy\": " << quoted(curve.policy) << ", \"capacity_chunks\": " << report.capacities[i]
             << ", \"hits\": " << outcome.hits << ", \"hit_rate\": " << std::setprecision(6) << std::fixed
             << report.hit_rate(outcome);
      if (curve.policy != "OPTIMUM") output << ", \"evictions\": " << outcome.evictions;
      output << "}";
      separator = ",";
    }
  }
  output << "\n]}\n";
}

void write_svg(std::ostream& output, const Report& report) {
  constexpr double kWidth = 720, kHeight = 420, kLeft = 60, kRight = 110, kTop = 40, kBottom = 50;
  constexpr std::array<const char*, 6> kColours = {"#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b", "#e377c2"};
  const double from = std::log2(static_cast<double>(report.capacities.front()));
  const double span = std::max(1e-9, std::log2(static_cast<double>(report.capacities.back())) - from);
  const auto x = [&](std::uint64_t capacity) {
    return kLeft + (kWidth - kLeft - kRight) * (std::log2(static_cast<double>(capacity)) - from) / span;
  };
  const auto y = [&](double rate) { return kHeight - kBottom - (kHeight - kTop - kBottom) * rate; };
  output << std::fixed << std::setprecision(1) << "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"" << kWidth << "\" height=\""
         << kHeight << "\" font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
         << "<text x=\"" << kLeft << "\" y=\"20\">" << xml(report.trace) << ": hit rate by capacity (chunks)</text>\n";
  for (int percent = 0; percent <= 100; percent += 20) {
    output << "<line x1=\"" << kLeft << "\" x2=\"" << kWidth - kRight << "\" y1=\"" << y(percent / 100.0) << "\" y2=\""
           << y(percent / 100.0) << "\" stroke=\"#ddd\"/><text x=\"" << kLeft - 8 << "\" y=\"" << y(percent / 100.0) + 4
           << "\" text-anchor=\"end\">" << percent << "%</text>\n";
  }
  for (const std::uint64_t capacity : report.capacities) {
    output << "<text x=\"" << x(capacity) << "\" y=\"" << kHeight - kBottom + 20 << "\" text-anchor=\"middle\">" << capacity
           << "</text>\n";
  }
  for (std::size_t c = 0; c < report.curves.size(); ++c) {
    const bool optimum = report.curves[c].policy == "OPTIMUM";
    const char* colour = optimum ? "black" : kColours[c % kColours.size()];
    output << "<polyline fill=\"none\" stroke-width=\"2\" stroke=\"" << colour << (optimum ? "\" stroke-dasharray=\"6 4" : "")
           << "\" points=\"";
    for (std::size_t i = 0; i < report.capacities.size(); ++i) {
      output << x(report.capacities[i]) << ',' << y(report.hit_rate(report.curves[c].outcomes[i])) << ' ';
    }
    output << "\"/>\n<text x=\"" << kWidth - kRight + 12 << "\" y=\"" << kTop + 18 * static_cast<double>(c + 1) << "\" fill=\""
           << colour << "\">" << xml(report.curves[c].policy) << "</text>\n";
  }
  output << "</svg>\n";
}

}  // namespace lmcn::simulator
