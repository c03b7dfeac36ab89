#include "trace.hpp"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <istream>
#include <ostream>

namespace lmcn::simulator {
namespace {

/// One line of JSON Lines: an object of numbers, strings, arrays and whatever else is passed over. Stops at the first error.
class Line {
 public:
  explicit Line(std::string_view text) : rest_(text) {}

  /// Calls field(name) for each field; field must take its value.
  template <class Field>
  bool object(Field&& field) {
    if (!take('{')) return false;
    if (peek() == '}') return take('}');
    do {
      std::string name;
      if (!string(name) || !take(':') || !field(name)) return false;
    } while (peek() == ',' && take(','));
    return take('}');
  }
  template <class Item>
  bool array(Item&& item) {
    if (!take('[')) return false;
    if (peek() == ']') return take(']');
    do {
      if (!item()) return false;
    } while (peek() == ',' && take(','));
    return take(']');
  }
  template <class Number>
  bool number(Number& value) {
    peek();
    const auto [end, error] = std::from_chars(rest_.data(), rest_.data() + rest_.size(), value);
    if (error != std::errc()) return fail("a number");
    rest_.remove_prefix(static_cast<std::size_t>(end - rest_.data()));
    if (!rest_.empty() && (std::isalnum(static_cast<unsigned char>(rest_[0])) || rest_[0] == '.')) return fail("a whole number");
    return true;
  }
  bool string(std::string& value) {
    if (!take('"')) return false;
    value.clear();
    for (std::size_t i = 0; i < rest_.size(); ++i) {
      if (rest_[i] == '"') {
        rest_.remove_prefix(i + 1);
        return true;
      }
      value.push_back(rest_[i]);
      if (rest_[i] == '\\' && i + 1 < rest_.size()) value.push_back(rest_[++i]);
    }
    rest_ = {};
    return fail("the end of a string");
  }
  bool pass_over() {
    std::string ignored;
    switch (peek()) {
      case '{':
        return object([this](const std::string&) { return pass_over(); });
      case '[':
        return array([this] { return pass_over(); });
      case '"':
        return string(ignored);
      default:
        break;
    }
    for (const std::string_view word : {"true", "false", "null"}) {
      if (rest_.starts_with(word)) {
        rest_.remove_prefix(word.size());
        return true;
      }
    }
    double value = 0;
    return number(value);
  }
  bool fail(const std::string& expected) {
    if (error_.empty()) {
      error_ = "expected " + expected + (rest_.empty() ? ", the line ends" : ", got \"" + std::string(rest_.substr(0, 20)) + "\"");
    }
    return false;
  }
  bool at_end() {
    peek();
    return rest_.empty() || fail("the end of the line");
  }
  const std::string& error() const { return error_; }

 private:
  char peek() {
    while (!rest_.empty() && std::isspace(static_cast<unsigned char>(rest_[0]))) rest_.remove_prefix(1);
    return rest_.empty() ? '\0' : rest_[0];
  }
  bool take(char wanted) {
    if (peek() != wanted) return fail(std::string("'") + wanted + "'");
    rest_.remove_prefix(1);
    return true;
  }

  std::string_view rest_;
  std::string error_;
};

/// What is wrong, or nothing.
std::string read_line(std::string_view text, Format format, Request& request) {
  bool has_time = false, has_input = false, has_blocks = false;
  std::string field;  // being read
  Line line(text);
  const auto value_of = [&](const std::string& name) {
    if (name == "timestamp") {
      has_time = true;
      return line.number(request.seconds);
    }
    if (name == "input_length") {
      has_input = true;
      return line.number(request.input_tokens);
    }
    if (name == "output_length") return line.number(request.output_tokens);
    if (name == "hash_ids") {
      has_blocks = true;
      return line.array([&] { return line.number(request.blocks.emplace_back()); });
    }
    return line.pass_over();
  };
  const bool good = line.object([&](const std::string& name) {
    field = "\"" + name + "\": ";
    if (!value_of(name)) return false;
    field.clear();
    return true;
  });
  if (!good || !line.at_end()) return field + line.error();
  if (request.seconds < 0) return "\"timestamp\": expected a number >= 0";
  if (!has_time) return "\"timestamp\" is missing";
  if (!has_input) return "\"input_length\" is missing";
  if (!has_blocks) return "\"hash_ids\" is missing";
  if (format == Format::kMooncake) request.seconds /= 1000;
  return {};
}

}  // namespace

Result<Trace> read_trace(std::istream& input, Format format) {
  Trace trace;
  std::string text;
  for (std::uint64_t number = 1; std::getline(input, text); ++number) {
    if (std::all_of(text.begin(), text.end(), [](unsigned char c) { return std::isspace(c) != 0; })) continue;
    const std::string wrong = read_line(text, format, trace.emplace_back());
    if (!wrong.empty()) return Status(Code::kInvalidArgument, "line " + std::to_string(number) + ": " + wrong);
  }
  if (input.bad()) return Status(Code::kIoError, "the trace cannot be read");
  if (trace.empty()) return Status(Code::kInvalidArgument, "the trace has no requests");
  std::stable_sort(trace.begin(), trace.end(), [](const Request& a, const Request& b) { return a.seconds < b.seconds; });
  return trace;
}

void write_trace(std::ostream& output, const Trace& trace) {
  for (const Request& request : trace) {
    output << "{\"timestamp\": " << static_cast<std::uint64_t>(request.seconds * 1000)
           << ", \"input_length\": " << request.input_tokens << ", \"output_length\": " << request.output_tokens
           << ", \"hash_ids\": [";
    const char* separator = "";
    for (const std::uint64_t block : request.blocks) {
      output << separator << block;
      separator = ", ";
    }
    output << "]}\n";
  }
}

}  // namespace lmcn::simulator
