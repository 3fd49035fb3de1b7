// Picture files to and from RGB bytes: PNG by libpng, JPEG by libjpeg-turbo (TurboJPEG).
//
// Both check what they read, and libjpeg-turbo decodes to the very bytes that Pillow gives; stb_image does
// neither.
#pragma once

#include <png.h>
#include <turbojpeg.h>

#include <cstring>

#include "pixels.hpp"

namespace svd {

constexpr std::int64_t max_pixels = 64'000'000;

inline std::vector<unsigned char> read_file(const std::string& path, const std::string& what) {
  std::ifstream file(path, std::ios::binary);
  if (!fs::is_regular_file(path) || !file)
    throw Error(what, "a file that can be read",
                fs::exists(path) ? "a folder, a device or no permission" : "nothing at that path",
                "Check the path.");
  return {std::istreambuf_iterator<char>(file), {}};
}

[[noreturn]] inline void damaged(const std::string& what, const std::string& got) {
  throw Error(what, "a whole picture, PNG or JPEG (RGB or grey)", got,
              "Copy the file again, or convert it to PNG.");
}

inline void check_size(const std::string& what, std::int64_t width, std::int64_t height) {
  if (width > 65'535 || height > 65'535 || width * height > max_pixels)
    throw Error(what, "at most 64,000,000 pixels and 65,535 a side",
                std::to_string(width) + " x " + std::to_string(height), "Shrink it first.");
}

/// EXIF's orientation, 1 to 8: tag 0x112 of the first directory of the TIFF structure at `tiff`.
inline int exif_orientation(const unsigned char* tiff, std::size_t size) {
  const auto number = [&](std::size_t at, std::size_t bytes) -> std::size_t {
    std::size_t value = 0;
    for (std::size_t i = 0; i < bytes && at + bytes <= size; ++i)
      value |= static_cast<std::size_t>(tiff[at + i]) << 8 * (tiff[0] == 'I' ? i : bytes - 1 - i);
    return value;
  };
  const auto directory = size < 8 ? size : number(4, 4);
  for (std::size_t i = 0; i < number(directory, 2); ++i) {
    const auto at = directory + 2 + 12 * i;
    if (at + 12 > size) break;
    if (number(at, 2) == 0x112) return static_cast<int>(number(at + 8, 2));
  }
  return 1;
}

/// Turned and mirrored so that it is upright.
inline Picture upright(const Picture& from, int orientation) {
  if (orientation < 2 || orientation > 8) return from;
  const bool swapped = orientation > 4;  // rows are columns
  Picture to{swapped ? from.width : from.height, swapped ? from.height : from.width, {}};
  const bool left = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
  const bool up = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
  for (int y = 0; y < to.height; ++y)
    for (int x = 0; x < to.width; ++x) {
      const int column = swapped ? y : x, row = swapped ? x : y;
      const auto at = std::ptrdiff_t(up ? from.height - 1 - row : row) * from.width +
                      (left ? from.width - 1 - column : column);
      to.rgb.insert(to.rgb.end(), from.rgb.begin() + 3 * at, from.rgb.begin() + 3 * at + 3);
    }
  return to;
}

inline Picture read_jpeg(const std::vector<unsigned char>& file, const std::string& what) {
  const std::unique_ptr<void, int (*)(tjhandle)> turbo(tjInitDecompress(), tjDestroy);
  Picture picture{};
  int subsampling = 0, colours = 0;
  int &width = picture.width, &height = picture.height;
  if (tjDecompressHeader3(turbo.get(), file.data(), file.size(), &width, &height, &subsampling, &colours) ||
      width < 1 || height < 1)
    damaged(what, tjGetErrorStr2(turbo.get()));
  check_size(what, width, height);
  picture.rgb.resize(std::size_t(3) * width * height);
  if (tjDecompress2(turbo.get(), file.data(), file.size(), picture.rgb.data(), width, 0, height, TJPF_RGB,
                    TJFLAG_ACCURATEDCT))
    damaged(what, tjGetErrorStr2(turbo.get()));
  for (std::size_t at = 2; at + 10 < file.size() && file[at] == 0xff && file[at + 1] != 0xda;) {  // segments
    const std::size_t size = file[at + 2] << 8 | file[at + 3];
    if (file[at + 1] == 0xe1 && std::memcmp(&file[at + 4], "Exif\0", 6) == 0 && at + 2 + size <= file.size())
      return upright(picture, exif_orientation(&file[at + 10], size - 8));
    at += 2 + size;
  }
  return picture;
}

/// Colours laid over white, as Pillow's alpha_composite rounds it.
inline std::uint8_t over_white(int colour, int alpha) {
  const int sum = 128 * (colour * alpha + 255 * (255 - alpha)) + (128 << 7);
  return alpha ? static_cast<std::uint8_t>(((sum >> 8) + sum) >> 8 >> 7) : std::uint8_t{255};
}

inline Picture read_png(const std::vector<unsigned char>& file, const std::string& what) {
  struct Source {
    const unsigned char* data;
    std::size_t left;
    std::string error;
    int orientation;
  } source{file.data(), file.size(), "", 1};
  std::vector<unsigned char> rgba;
  std::vector<unsigned char*> rows;
  Picture picture{};
  png_infop info = nullptr;
  const auto failed = [](png_structp png, const char* message) {
    static_cast<Source*>(png_get_error_ptr(png))->error = message;
    png_longjmp(png, 1);
  };
  const auto ignored = [](png_structp, const char*) {};
  png_structp png = png_create_read_struct(PNG_LIBPNG_VER_STRING, &source, failed, ignored);
  if (setjmp(png_jmpbuf(png))) {  // nothing with a destructor is made below
    png_destroy_read_struct(&png, &info, nullptr);
    damaged(what, source.error);
  }
  info = png_create_info_struct(png);
  png_set_read_fn(png, &source, [](png_structp reader, png_bytep into, std::size_t count) {
    auto& from = *static_cast<Source*>(png_get_io_ptr(reader));
    if (count > from.left) png_error(reader, "the file ends early");
    std::memcpy(into, from.data, count);
    from.data += count;
    from.left -= count;
  });
  png_read_info(png, info);
  picture.width = int(png_get_image_width(png, info));
  picture.height = int(png_get_image_height(png, info));
  const bool fits = picture.width <= 65'535 && picture.height <= 65'535 &&
                    std::int64_t(picture.width) * picture.height <= max_pixels;
  if (fits) {
    const bool grey = png_get_color_type(png, info) == PNG_COLOR_TYPE_GRAY;
    if (grey) png_set_scale_16(png);  // Pillow rounds 16-bit grey and cuts off 16-bit colours
    else png_set_strip_16(png);
    png_set_expand(png);
    png_set_gray_to_rgb(png);
    png_set_add_alpha(png, 255, PNG_FILLER_AFTER);
    png_set_interlace_handling(png);
    png_read_update_info(png, info);
    rgba.resize(png_get_rowbytes(png, info) * picture.height);
    for (int y = 0; y < picture.height; ++y) rows.push_back(&rgba[y * png_get_rowbytes(png, info)]);
    png_read_image(png, rows.data());
    png_read_end(png, info);
    png_bytep exif = nullptr;
    png_uint_32 size = 0;
    if (png_get_eXIf_1(png, info, &size, &exif)) source.orientation = exif_orientation(exif, size);
  }
  png_destroy_read_struct(&png, &info, nullptr);
  check_size(what, picture.width, picture.height);
  for (std::size_t i = 0; i < rgba.size(); i += 4)
    for (std::size_t c = 0; c < 3; ++c) picture.rgb.push_back(over_white(rgba[i + c], rgba[i + 3]));
  return upright(picture, source.orientation);
}

/// A PNG or JPEG file as RGB bytes: upright (EXIF), transparency over white, colour profiles ignored.
inline Picture read_picture(const std::string& path) {
  const auto what = "image " + path;
  const auto file = read_file(path, what);
  if (file.size() > 8 && png_sig_cmp(file.data(), 0, 8) == 0) return read_png(file, what);
  if (file.size() > 2 && file[0] == 0xff && file[1] == 0xd8) return read_jpeg(file, what);
  damaged(what, file.empty() ? "an empty file" : "another format");
}

inline void write_png(const fs::path& path, const std::uint8_t* rgb, int height, int width) {
  png_image image{};
  image.version = PNG_IMAGE_VERSION;
  image.width = png_uint_32(width);
  image.height = png_uint_32(height);
  image.format = PNG_FORMAT_RGB;
  if (!png_image_write_to_file(&image, path.c_str(), 0, rgb, 0, nullptr))
    throw Error("output " + path.string(), "to write it", image.message, "Make room, or write elsewhere.");
}

}  // namespace svd
