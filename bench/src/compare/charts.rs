//! Curves as SVG. Text takes its colour from the page, and every line is grey or in a colour that can be told from
//! white and from black, so that one drawing serves light and dark.

use std::ops::Range;

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged};
use plotters::prelude::*;

use super::measure::{Results, Sample};
use super::spread::{Spread, number};

/// Size of a drawing.
const SIZE: (u32, u32) = (640, 380);
/// Height of the one that has the finest lines.
const TALL: u32 = 540;
const FONT: (&str, u32) = ("sans-serif", 14);
const GREY: RGBColor = RGBColor(128, 128, 128);
const COLOURS: [RGBColor; 8] = [
    RGBColor(59, 130, 246),
    RGBColor(220, 68, 55),
    RGBColor(16, 160, 110),
    RGBColor(217, 130, 6),
    RGBColor(158, 95, 235),
    RGBColor(8, 150, 178),
    RGBColor(219, 60, 130),
    RGBColor(118, 140, 20),
];

/// Colour of a back end, for drawings.
fn colour(index: usize) -> RGBColor {
    COLOURS[index % COLOURS.len()]
}

/// Colour of a back end, for the page.
pub fn css_colour(index: usize) -> String {
    let RGBColor(r, g, b) = colour(index);
    format!("#{r:02x}{g:02x}{b:02x}")
}

/// A linear axis with marks at given places only.
struct Marks {
    range: Range<f64>,
    marks: Vec<f64>,
}

impl Ranged for Marks {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (low, high): (i32, i32)) -> i32 {
        let part = (value - self.range.start) / (self.range.end - self.range.start);
        low + (part * f64::from(high - low)).round() as i32
    }

    fn key_points<H: KeyPointHint>(&self, hint: H) -> Vec<f64> {
        if hint.weight().allow_light_points() { Vec::new() } else { self.marks.clone() }
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

fn draw(
    height: u32,
    what: impl FnOnce(&Area<'_>) -> Result<(), Box<dyn std::error::Error>>,
) -> Result<String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (SIZE.0, height)).into_drawing_area();
        what(&area).map_err(|e| anyhow!("drawing: {e}"))?;
        area.present().map_err(|e| anyhow!("drawing: {e}"))?;
    }
    Ok(svg)
}

/// Latency by percentile, over a logarithmic axis of 1 / (1 - p): the median of the rounds, and a band from the
/// least to the greatest. `None` if there is nothing to draw.
pub fn latency(results: &Results, point: usize) -> Result<Option<String>> {
    let mut curves = Vec::new();
    for (index, backend) in results.backends.iter().enumerate() {
        let samples: Vec<&Sample> = results.of(point, &backend.name).collect();
        // Only as far as all rounds reach, or the end of the line would be of other rounds than its middle.
        let shortest = samples.iter().map(|s| s.percentiles.len()).filter(|n| *n > 0).min().unwrap_or(0);
        let at = |i: usize| {
            let here = samples.iter().filter_map(move |s| s.percentiles.get(i));
            let x = here.clone().next().map(|[part, _]| 1.0 / (1.0 - part))?;
            // A logarithm needs more than nothing.
            Some((x, Spread::of(here.map(|[_, us]| us.max(0.001)))?))
        };
        let curve: Vec<(f64, Spread)> = (0..shortest).filter_map(at).collect();
        if !curve.is_empty() {
            curves.push((index, curve));
        }
    }
    let all = || curves.iter().flat_map(|(_, c)| c);
    let Some(span) = Spread::of(all().flat_map(|(_, s)| [s.min, s.max])) else { return Ok(None) };
    let right = all().map(|(x, _)| *x).fold(10.0, f64::max);
    let (bottom, top) = (span.min / 1.2, span.max * 1.2);
    let nines: Vec<f64> = (0..=7).map(|i| 10f64.powi(i)).filter(|x| *x <= right * 1.01).collect();
    let steps = steps_between(bottom, top);
    draw(TALL, |area| {
        let mut chart = ChartBuilder::on(area)
            .margin(10)
            .margin_right(24)
            .x_label_area_size(44)
            .y_label_area_size(76)
            .build_cartesian_2d(
                (1.0..right * 1.05).log_scale().with_key_points(nines),
                (bottom..top).log_scale().with_key_points(steps),
            )?;
        chart
            .configure_mesh()
            .bold_line_style(GREY.mix(0.3))
            .light_line_style(TRANSPARENT)
            .axis_style(GREY)
            .label_style(FONT)
            .x_desc("percentile")
            .y_desc("latency, µs")
            .x_label_formatter(&|x| percentile(*x))
            .y_label_formatter(&|y| short(*y))
            .draw()?;
        for (index, curve) in &curves {
            let low = curve.iter().map(|(x, s)| (*x, s.min));
            let high = curve.iter().rev().map(|(x, s)| (*x, s.max));
            let band: Vec<(f64, f64)> = low.chain(high).collect();
            chart.draw_series([Polygon::new(band, colour(*index).mix(0.15))])?;
        }
        for (index, curve) in &curves {
            let line = curve.iter().map(|(x, s)| (*x, s.median));
            chart.draw_series(LineSeries::new(line, colour(*index).stroke_width(2)))?;
        }
        Ok(())
    })
    .map(Some)
}

/// A figure by what was swept: a line through the medians, and bars from the least to the greatest.
pub fn against(
    results: &Results,
    points: &[(u64, usize)],
    x_name: &str,
    y_name: &str,
    of: fn(&Sample) -> Option<f64>,
) -> Result<Option<String>> {
    let mut lines = Vec::new();
    for (index, backend) in results.backends.iter().enumerate() {
        // Beside each other, or bars would hide each other.
        let shift = (index as f64 - (results.backends.len() as f64 - 1.0) / 2.0) * 0.05;
        let spread = |point: usize| Spread::of(results.of(point, &backend.name).filter_map(of));
        let line: Vec<(f64, Spread)> = points
            .iter()
            .enumerate()
            .filter_map(|(i, (_, point))| Some((i as f64 + shift, spread(*point)?)))
            .collect();
        lines.push((index, line));
    }
    let top = lines.iter().flat_map(|(_, l)| l).map(|(_, s)| s.max).fold(0.0, f64::max);
    if top <= 0.0 {
        return Ok(None);
    }
    let keys: Vec<f64> = (0..points.len()).map(|i| i as f64).collect();
    draw(SIZE.1, |area| {
        let mut chart = ChartBuilder::on(area)
            .margin(10)
            .margin_right(24)
            .x_label_area_size(44)
            .y_label_area_size(76)
            .build_cartesian_2d(
                Marks { range: -0.4..points.len() as f64 - 0.6, marks: keys },
                0.0..top * 1.08,
            )?;
        chart
            .configure_mesh()
            .bold_line_style(GREY.mix(0.3))
            .light_line_style(TRANSPARENT)
            .axis_style(GREY)
            .label_style(FONT)
            .x_desc(x_name)
            .y_desc(y_name)
            .y_labels(8)
            .x_label_formatter(&|x| points.get(*x as usize).map_or(String::new(), |(v, _)| short(*v as f64)))
            .y_label_formatter(&|y| short(*y))
            .draw()?;
        for (index, line) in &lines {
            let style = colour(*index).stroke_width(2);
            let middle: Vec<(f64, f64)> = line.iter().map(|(x, s)| (*x, s.median)).collect();
            chart.draw_series(LineSeries::new(middle.iter().copied(), style))?;
            chart.draw_series(middle.iter().map(|at| Circle::new(*at, 3, colour(*index).filled())))?;
            chart.draw_series(
                line.iter().map(|(x, s)| ErrorBar::new_vertical(*x, s.min, s.median, s.max, style, 8)),
            )?;
        }
        Ok(())
    })
    .map(Some)
}

/// A figure of one point: a bar to the median for each back end, and a line from the least to the greatest.
pub fn bars(
    results: &Results,
    point: usize,
    x_name: &str,
    of: fn(&Sample) -> Option<f64>,
) -> Result<Option<String>> {
    let rows: Vec<(usize, &str, Spread)> = results
        .backends
        .iter()
        .enumerate()
        .filter_map(|(i, b)| {
            Some((i, b.name.as_str(), Spread::of(results.of(point, &b.name).filter_map(of))?))
        })
        .collect();
    let top = rows.iter().map(|(_, _, s)| s.max).fold(0.0, f64::max);
    if top <= 0.0 {
        return Ok(None);
    }
    let keys: Vec<f64> = (0..rows.len()).map(|i| i as f64).collect();
    // About seven pixels a letter.
    let names = rows.iter().map(|(_, n, _)| n.len()).max().unwrap_or(0).clamp(6, 26) as u32 * 8 + 12;
    draw(80 + 34 * rows.len() as u32, |area| {
        let mut chart = ChartBuilder::on(area)
            .margin(10)
            .margin_right(24)
            .x_label_area_size(44)
            .y_label_area_size(names)
            .build_cartesian_2d(
                0.0..top * 1.05,
                // The first at the top.
                Marks { range: rows.len() as f64 - 0.5..-0.5, marks: keys },
            )?;
        chart
            .configure_mesh()
            .bold_line_style(GREY.mix(0.3))
            .light_line_style(TRANSPARENT)
            .disable_y_mesh()
            .axis_style(GREY)
            .label_style(FONT)
            .x_desc(x_name)
            .x_labels(7)
            .x_label_formatter(&|x| short(*x))
            .y_label_formatter(&|y| rows.get(*y as usize).map_or(String::new(), |(_, n, _)| (*n).to_owned()))
            .draw()?;
        for (at, (index, _, spread)) in rows.iter().enumerate() {
            let y = at as f64;
            let bar =
                Rectangle::new([(0.0, y - 0.3), (spread.median, y + 0.3)], colour(*index).mix(0.6).filled());
            chart.draw_series([bar])?;
            let line = GREY.stroke_width(2);
            let error = ErrorBar::new_horizontal(y, spread.min, spread.median, spread.max, line, 10);
            chart.draw_series([error])?;
        }
        Ok(())
    })
    .map(Some)
}

/// What 1 / (1 - p) is as a percentile.
fn percentile(x: f64) -> String {
    let nines = x.log10().round() as usize;
    match nines {
        0 => "0 %".into(),
        1 => "90 %".into(),
        n => format!("{:.*} %", n.saturating_sub(2), 100.0 - 100.0 / 10f64.powi(n as i32)),
    }
}

/// 1, 2 and 5 times the powers of ten in a range; only the powers if that is too many.
fn steps_between(bottom: f64, top: f64) -> Vec<f64> {
    let of = |factors: &[f64]| -> Vec<f64> {
        let decades = (-4..=9).flat_map(|i| factors.iter().map(move |f| f * 10f64.powi(i)));
        decades.filter(|v| (bottom..=top).contains(v)).collect()
    };
    let all = of(&[1.0, 2.0, 5.0]);
    if all.len() > 10 { of(&[1.0]) } else { all }
}

/// A number for an axis.
fn short(value: f64) -> String {
    let (value, unit) = match value.abs() {
        v if v >= 1e6 => (value / 1e6, " M"),
        v if v >= 1e4 => (value / 1e3, " k"),
        _ => (value, ""),
    };
    let digits = (0..4).find(|d| {
        let scale = 10f64.powi(*d);
        (value * scale - (value * scale).round()).abs() < 1e-6 * scale.max(1.0)
    });
    number(value, digits.unwrap_or(4) as usize) + unit
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_are_written_shortly() {
        let said: Vec<String> = [0.0, 0.25, 1500.0, 20_000.0, 2_500_000.0].map(short).into();
        assert_eq!(said, ["0", "0.25", "1,500", "20 k", "2.5 M"]);
        let said: Vec<String> = [1.0, 10.0, 100.0, 1000.0, 100_000.0].map(percentile).into();
        assert_eq!(said, ["0 %", "90 %", "99 %", "99.9 %", "99.999 %"]);
        assert_eq!(steps_between(0.5, 9.0), [0.5, 1.0, 2.0, 5.0]);
        assert_eq!(steps_between(0.05, 90_000.0).len(), 6);
    }
}
