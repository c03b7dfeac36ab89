#include "io_support.hpp"

namespace lmcn::io {
namespace {

class EngineFactoryTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (const char* text = std::getenv(kVariable)) before_ = text;
    ::unsetenv(kVariable);
  }
  void TearDown() override {
    if (before_) {
      ::setenv(kVariable, before_->c_str(), 1);
    } else {
      ::unsetenv(kVariable);
    }
  }
  static void set(const char* text) { ::setenv(kVariable, text, 1); }

  static constexpr const char* kVariable = "LMCN_IO_ENGINE";
  std::optional<std::string> before_;
};

TEST_F(EngineFactoryTest, ParsesKinds) {
  EXPECT_EQ(parse_engine_kind("auto").value(), EngineKind::kAuto);
  EXPECT_EQ(parse_engine_kind("io_uring").value(), EngineKind::kIoUring);
  EXPECT_EQ(parse_engine_kind("threads").value(), EngineKind::kThreads);
  for (const char* text : {"", "uring", "Threads"}) {
    const auto parsed = parse_engine_kind(text);
    ASSERT_FALSE(parsed.ok());
    EXPECT_EQ(parsed.status().code(), Code::kInvalidArgument);
    EXPECT_NE(parsed.status().message().find("expected auto, io_uring or threads"), std::string::npos);
  }
}

TEST_F(EngineFactoryTest, AutoSaysWhatItChose) {
  const bool have = make_engine({.kind = EngineKind::kIoUring}).ok();
  std::string why;
  const auto made = make_engine({}, &why);
  ASSERT_TRUE(made.ok());
  EXPECT_EQ(made.value()->name(), have ? "io_uring" : "threads");
  EXPECT_NE(why.find(have ? "io_uring (" : "no io_uring here"), std::string::npos) << why;
  EXPECT_EQ(why.find('\n'), std::string::npos);
}

TEST_F(EngineFactoryTest, VariableOverridesAutoOnly) {
  set("threads");
  std::string why;
  const auto by_variable = make_engine({}, &why);
  ASSERT_TRUE(by_variable.ok());
  EXPECT_EQ(by_variable.value()->name(), "threads");
  EXPECT_EQ(why, "threads (4): LMCN_IO_ENGINE=threads");
  set("io_uring");
  const auto asked = make_engine({.kind = EngineKind::kThreads}, &why);
  ASSERT_TRUE(asked.ok());
  EXPECT_EQ(asked.value()->name(), "threads");
  EXPECT_EQ(why, "threads (4): asked for");
}

TEST_F(EngineFactoryTest, WrongValuesNameTheField) {
  set("libaio");
  const auto made = make_engine({});
  ASSERT_FALSE(made.ok());
  EXPECT_EQ(made.status().code(), Code::kInvalidArgument);
  EXPECT_EQ(made.status().message(), "LMCN_IO_ENGINE: I/O engine \"libaio\": expected auto, io_uring or threads");
  EXPECT_TRUE(make_engine({.kind = EngineKind::kThreads}).ok()) << "the variable matters for auto only";
  EXPECT_EQ(make_engine({.kind = EngineKind::kThreads, .queue_depth = 0}).status().message(), "queue_depth = 0: expected 1..4096");
  EXPECT_EQ(make_engine({.kind = EngineKind::kThreads, .threads = 0}).status().message(), "threads = 0: expected 1..256");
}

}  // namespace
}  // namespace lmcn::io
