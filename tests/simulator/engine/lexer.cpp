#include "lexer.h"

#include <cctype>

namespace sim {

namespace {

bool starts_word(char c) {
  return std::isalpha(static_cast<u8>(c)) || c == '_' || c == '$' || c == '%' || c == '.';
}

// Opcodes keep their dots and "::" ("cp.async.bulk.shared::cluster"): one word.
bool continues_word(char c) { return std::isalnum(static_cast<u8>(c)) || c == '_' || c == '$' || c == '.'; }

}  // namespace

std::string hex(u64 value) {
  char buffer[32];
  snprintf(buffer, sizeof buffer, "0x%llx", static_cast<unsigned long long>(value));
  return buffer;
}

void Lexer::skip_blanks() {
  while (at_ < text_.size()) {
    char c = text_[at_];
    if (c == '\n') {
      line_++;
      at_++;
    } else if (std::isspace(static_cast<u8>(c))) {
      at_++;
    } else if (text_.compare(at_, 2, "//") == 0) {
      at_ = std::min(text_.find('\n', at_), text_.size());
    } else if (text_.compare(at_, 2, "/*") == 0) {
      size_t end = std::min(text_.find("*/", at_ + 2), text_.size() - 2);
      for (; at_ < end + 2; at_++) line_ += text_[at_] == '\n';
    } else {
      return;
    }
  }
}

void Lexer::lex_number() {
  size_t start = at_;
  char second = at_ + 1 < text_.size() ? text_[at_ + 1] : ' ';
  if (text_[at_] == '0' && (second == 'f' || second == 'F' || second == 'd' || second == 'D')) {
    int digits = second == 'f' || second == 'F' ? 8 : 16;
    token_.kind = digits == 8 ? Token::kFloat32 : Token::kFloat64;
    token_.value = std::stoull(text_.substr(at_ + 2, digits), nullptr, 16);
    at_ += 2 + digits;
  } else {
    int base = 10;
    if (text_[at_] == '0') {
      if (second == 'x' || second == 'X') base = 16;
      if (second == 'b' || second == 'B') base = 2;
      if (std::isdigit(static_cast<u8>(second))) base = 8;
    }
    if (base == 16 || base == 2) at_ += 2;
    size_t digits = at_;
    while (at_ < text_.size() && std::isxdigit(static_cast<u8>(text_[at_]))) at_++;
    if (base == 10 && at_ < text_.size() && text_[at_] == '.') {  // decimal constants are doubles
      at_++;
      while (at_ < text_.size() && (std::isdigit(static_cast<u8>(text_[at_])) || text_[at_] == 'e')) at_++;
      token_.kind = Token::kFloat64;
      token_.value = bits_as<u64>(std::stod(text_.substr(start, at_ - start)));
    } else {
      token_.kind = Token::kNumber;
      token_.value = std::stoull(text_.substr(digits, at_ - digits), nullptr, base);
      if (at_ < text_.size() && text_[at_] == 'U') at_++;
    }
  }
  token_.text = text_.substr(start, at_ - start);
}

void Lexer::advance() {
  skip_blanks();
  token_ = Token{};
  token_.line = line_;
  if (at_ >= text_.size()) return;
  char c = text_[at_];
  if (c == '"') {
    size_t end = text_.find('"', at_ + 1);
    token_.kind = Token::kString;
    token_.text = text_.substr(at_ + 1, end - at_ - 1);
    at_ = end + 1;
  } else if (std::isdigit(static_cast<u8>(c))) {
    lex_number();
  } else if (c == '_' && (at_ + 1 == text_.size() || !continues_word(text_[at_ + 1]))) {
    token_ = Token{Token::kPunct, "_", 0, line_};
    at_++;
  } else if (starts_word(c)) {
    size_t start = at_++;
    while (at_ < text_.size() &&
           (continues_word(text_[at_]) || (text_.compare(at_, 2, "::") == 0 && ++at_))) {
      at_++;
    }
    token_.kind = Token::kWord;
    token_.text = text_.substr(start, at_ - start);
  } else {
    token_ = Token{Token::kPunct, std::string(1, c), 0, line_};
    at_++;
  }
}

bool Lexer::accept(const char* text) {
  if (!is(text)) return false;
  advance();
  return true;
}

void Lexer::expect(const char* text) {
  if (!accept(text)) {
    fail("unsupported",
         "PTX line " + std::to_string(token_.line) + ": expected '" + text + "', got '" + token_.text + "'");
  }
}

std::string Lexer::word() {
  if (token_.kind != Token::kWord) {
    fail("unsupported",
         "PTX line " + std::to_string(token_.line) + ": expected a name, got '" + token_.text + "'");
  }
  return next().text;
}

u64 Lexer::number() {
  bool negative = accept("-");
  if (token_.kind != Token::kNumber) {
    fail("unsupported",
         "PTX line " + std::to_string(token_.line) + ": expected a number, got '" + token_.text + "'");
  }
  u64 value = next().value;
  return negative ? -value : value;
}

void Lexer::skip_block() {
  for (int depth = 1; depth && token_.kind != Token::kEnd;) {
    if (is("{")) depth++;
    if (is("}")) depth--;
    advance();
  }
}

}  // namespace sim
