//! Small pictures with indexed colours.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::{Result, font};

/// A picture, pixel by pixel.
#[derive(Debug, Clone)]
pub struct Picture {
    width: usize,
    height: usize,
    pixels: Vec<u8>,
    palette: Vec<[u8; 3]>,
}

impl Picture {
    /// A picture filled with the first colour of a palette of up to 256.
    pub fn new(width: usize, height: usize, palette: Vec<[u8; 3]>) -> Self {
        Self { width, height, pixels: vec![0; width * height], palette }
    }

    /// Colours one pixel; nothing where it is outside.
    pub fn set(&mut self, x: usize, y: usize, colour: u8) {
        if x < self.width && y < self.height {
            self.pixels[y * self.width + x] = colour;
        }
    }

    /// Fills a rectangle.
    pub fn fill(&mut self, (x, y): (usize, usize), (width, height): (usize, usize), colour: u8) {
        for y in y..y + height {
            for x in x..x + width {
                self.set(x, y, colour);
            }
        }
    }

    /// Writes text with its top left corner at a place, dots of `size` pixels.
    pub fn text(&mut self, (x, y): (usize, usize), size: usize, colour: u8, text: &str) {
        for (index, letter) in text.chars().enumerate() {
            for (row, dots) in font::rows(letter).iter().enumerate() {
                for (column, _) in dots.char_indices().filter(|(_, dot)| *dot == '#') {
                    let left = x + (index * (font::WIDTH + 1) + column) * size;
                    self.fill((left, y + row * size), (size, size), colour);
                }
            }
        }
    }

    /// Width of a text written at `size`.
    pub fn text_width(size: usize, text: &str) -> usize {
        (text.chars().count() * (font::WIDTH + 1)).saturating_sub(1) * size
    }

    /// The picture as a PNG file.
    ///
    /// # Errors
    ///
    /// A width or height of zero, or a colour that the palette does not have.
    pub fn png(&self) -> Result<Vec<u8>> {
        let mut file = Vec::new();
        let mut encoder = png::Encoder::new(&mut file, self.width as u32, self.height as u32);
        encoder.set_color(png::ColorType::Indexed);
        encoder.set_depth(png::BitDepth::Eight);
        encoder.set_palette(self.palette.concat());
        encoder.set_compression(png::Compression::High);
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&self.pixels)?;
        writer.finish()?;
        Ok(file)
    }

    /// The picture as the address of an image in a page.
    ///
    /// # Errors
    ///
    /// Those of [`png`](Self::png).
    pub fn data_uri(&self) -> Result<String> {
        Ok(format!("data:image/png;base64,{}", STANDARD.encode(self.png()?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_reads_back_as_it_was_drawn() {
        let mut picture = Picture::new(9, 6, vec![[255; 3], [0; 3], [255, 0, 0]]);
        picture.text((0, 0), 1, 1, "I");
        picture.fill((5, 2), (10, 2), 2);
        let file = picture.png().unwrap();
        let mut reader = png::Decoder::new(std::io::Cursor::new(file)).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut pixels).unwrap();
        assert_eq!((info.width, info.height), (9, 6));
        let rows: Vec<&[u8]> = pixels.chunks(pixels.len() / 6).take(6).collect();
        assert_eq!(rows[0][..9], [1, 1, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(rows[1][..9], [0, 1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(rows[2][..9], [0, 1, 0, 0, 0, 2, 2, 2, 2]);
        assert!(picture.data_uri().unwrap().starts_with("data:image/png;base64,iVBOR"));
    }

    #[test]
    fn every_letter_is_three_by_five() {
        for letter in (32u8..127).map(char::from) {
            assert!(font::rows(letter).iter().all(|row| row.len() == font::WIDTH), "{letter}");
        }
        assert_eq!(Picture::text_width(2, "ab"), 14);
    }
}
