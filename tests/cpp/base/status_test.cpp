// What logs, metrics and Python's exceptions show of a failure.
#include "lmcn/status.hpp"

#include <gtest/gtest.h>

#include <cerrno>
#include <set>
#include <string>

namespace lmcn {
namespace {

TEST(Status, EachCodeHasItsOwnName) {
  std::set<std::string> names;
  for (unsigned code = 0; code <= static_cast<unsigned>(Code::kInternal); ++code) {
    EXPECT_TRUE(names.insert(code_name(static_cast<Code>(code))).second) << code;
  }
  EXPECT_TRUE(names.contains("ok"));
  EXPECT_TRUE(names.contains("format_version"));
  EXPECT_TRUE(names.contains("resource_exhausted"));
}

TEST(Status, TextHasCodeMessageAndErrno) {
  EXPECT_EQ(Status().to_string(), "ok");
  EXPECT_EQ(Status(Code::kLocked, "in use").to_string(), "locked: in use");
  const Status status = Status::from_errno(ENOSPC, "pwrite /x");
  EXPECT_EQ(status.code(), Code::kIoError);
  EXPECT_EQ(status.sys_errno(), ENOSPC);
  EXPECT_EQ(status.to_string(), "io_error: pwrite /x: No space left on device (28)");
}

TEST(Status, AResultHasAValueOrAFailure) {
  const Result<int> value(3);
  EXPECT_TRUE(value.ok());
  EXPECT_EQ(*value, 3);
  EXPECT_TRUE(value.status().ok());
  const Result<int> failed(Status(Code::kNotFound, "none"));
  EXPECT_FALSE(failed.ok());
  EXPECT_EQ(failed.status().code(), Code::kNotFound);
}

}  // namespace
}  // namespace lmcn
