// Splits PTX text into words, numbers and punctuation (PTX ISA 4.2 "Comments", 4.4 "Identifiers", 4.5
// "Constants").
#pragma once

#include <string>

#include "common.h"

namespace sim {

struct Token {
  enum Kind { kEnd, kWord, kNumber, kFloat32, kFloat64, kString, kPunct } kind = kEnd;
  std::string text;
  u64 value = 0;
  int line = 0;
};

class Lexer {
 public:
  explicit Lexer(const std::string& text) : text_(text) { advance(); }
  const Token& peek() const { return token_; }
  Token next() {
    Token token = token_;
    advance();
    return token;
  }
  bool is(const char* text) const { return token_.kind != Token::kString && token_.text == text; }
  bool accept(const char* text);
  void expect(const char* text);
  std::string word();
  u64 number();
  // Up to and with the matching brace; the opening one has been read.
  void skip_block();

 private:
  void advance();
  void skip_blanks();
  void lex_number();
  const std::string& text_;
  size_t at_ = 0;
  int line_ = 1;
  Token token_;
};

}  // namespace sim
