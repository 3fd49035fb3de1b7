// A JSON document held against a JSON schema: the keywords that manifest.schema.json uses, and no others.
#pragma once

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>
#include <regex>
#include <string>
#include <utility>

namespace svd {

using nlohmann::json;

/// A field that is not what its schema says.
struct Fault {
  std::string field, expected, got;  // model.rho; number from 0.1 to 1000; JSON text
};

class Schema {
 public:
  explicit Schema(const char* text) : root_(json::parse(text)) {}

  /// The first fault of `document`, if there is one.
  std::optional<Fault> fault(const json& document) const { return of(document, root_, ""); }

 private:
  json root_;
  using Found = std::optional<Fault>;

  Found of(const json& value, const json& schema, const std::string& field) const {
    if (schema.contains("$ref"))
      return of(value, root_.at(json::json_pointer(schema["$ref"].get<std::string>().substr(1))), field);
    if (schema.contains("anyOf")) {
      Found last;
      for (const auto& one : schema["anyOf"])
        if (last = of(value, one, field); !last) return {};
      return last;
    }
    if (!fits(value, schema)) return Fault{field, words(schema), value.dump()};
    if (value.is_array()) return of_items(value, schema, field);
    if (value.is_object()) return of_fields(value, schema, field);
    return {};
  }

  Found of_items(const json& list, const json& schema, const std::string& field) const {
    const auto first = schema.value("prefixItems", json::array());
    const auto others = schema.value("items", json::object());
    for (std::size_t at = 0; at < list.size(); ++at)
      if (auto found = of(list[at], at < first.size() ? first[at] : others, below(field, std::to_string(at))))
        return found;
    return {};
  }

  Found of_fields(const json& object, const json& schema, const std::string& field) const {
    for (const auto& name : schema.value("required", json::array()))
      if (!object.contains(name)) return Fault{below(field, name), "a field", "none"};
    const auto names = schema.value("propertyNames", json::object());
    for (const auto& [name, value] : object.items()) {
      const auto path = below(field, name);
      if (auto found = of(name, names, path)) return found;
      if (auto found = of(value, schema_of(name, schema), path)) return found;
    }
    return {};
  }

  /// That of the field `name`: by its name, by a pattern, or what is said of all others.
  static json schema_of(const std::string& name, const json& schema) {
    const auto named = schema.value("properties", json::object());
    if (named.contains(name)) return named[name];
    const auto like = schema.value("patternProperties", json::object());
    for (const auto& [pattern, one] : like.items())
      if (matches(name, pattern)) return one;
    return schema.value("additionalProperties", json(true));
  }

  /// The value itself, less what is inside it.  `true` and `false` are schemas: of everything, of nothing.
  static bool fits(const json& value, const json& schema) {
    if (schema.is_boolean()) return schema.get<bool>();
    const auto has = [&](const char* word) { return schema.contains(word); };
    if (has("type") && !is(value, schema["type"])) return false;
    if (has("const") && value != schema["const"]) return false;
    if (has("enum") && std::count(schema["enum"].begin(), schema["enum"].end(), value) == 0) return false;
    if (value.is_number())
      return !(has("minimum") && value < schema["minimum"]) &&
             !(has("maximum") && value > schema["maximum"]) &&
             !(has("exclusiveMinimum") && value <= schema["exclusiveMinimum"]);
    if (value.is_string()) {
      const auto text = value.get<std::string>();  // the length first: matching takes stack
      return !(has("maxLength") && code_points(text).size() > schema["maxLength"]) &&
             !(has("pattern") && !matches(text, schema["pattern"]));
    }
    if (value.is_array())
      return !(has("minItems") && value.size() < schema["minItems"]) &&
             !(has("maxItems") && value.size() > schema["maxItems"]);
    return !(has("minProperties") && value.size() < schema["minProperties"]);
  }

  static bool is(const json& value, const std::string& type) {
    if (type == "integer") return value.is_number_integer();  // 3.0 is none, as in Python
    if (type == "number") return value.is_number();
    if (type == "string") return value.is_string();
    if (type == "boolean") return value.is_boolean();
    if (type == "array") return value.is_array();
    if (type == "object") return value.is_object();
    return value.is_null();
  }

  /// What a value must be, in words.
  static std::string words(const json& schema) {
    if (schema.is_boolean()) return "no such field";
    std::string all;
    for (const auto& [word, said] :
         {std::pair{"type", ""}, {"const", ""}, {"enum", " one of "}, {"minimum", " from "},
          {"exclusiveMinimum", " above "}, {"maximum", " to "}, {"pattern", " like "},
          {"maxLength", " no longer than "}, {"minItems", " of at least "}, {"maxItems", " of at most "},
          {"minProperties", " of at least "}})
      if (schema.contains(word)) {
        const auto& value = schema[word];
        all += said + (value.is_string() ? value.get<std::string>() : value.dump());
      }
    return all;
  }

  static bool matches(const std::string& text, const std::string& pattern) {
    std::string whole = pattern;  // anchored, all of them: so that $ is the end of the text and of no line
    if (!whole.empty() && whole.front() == '^') whole.erase(0, 1);
    if (!whole.empty() && whole.back() == '$') whole.pop_back();
    return std::regex_match(code_points(text), std::wregex(std::wstring(whole.begin(), whole.end())));
  }

  /// The characters of a text in UTF-8, which the parser has checked.
  static std::wstring code_points(const std::string& text) {
    std::wstring all;
    for (const unsigned char byte : text)
      if (byte >> 6 == 2) all.back() = static_cast<wchar_t>(all.back() << 6 | (byte & 0x3f));
      else if (byte < 0x80) all += byte;
      else all += byte & (byte < 0xe0 ? 0x1f : byte < 0xf0 ? 0xf : 7);  // 2, 3 or 4 bytes
    return all;
  }

  static std::string below(const std::string& field, const std::string& name) {
    return field.empty() ? name : field + "." + name;
  }
};

}  // namespace svd
