//! Minimum, median and maximum; ratios of what ran side by side.

/// The spread of some values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// Least.
    pub min: f64,
    /// Middle; the mean of the two in the middle of an even number.
    pub median: f64,
    /// Greatest.
    pub max: f64,
}

impl Spread {
    /// Of numbers; those that are none are left out. `None` of nothing.
    pub fn of(values: impl Iterator<Item = f64>) -> Option<Spread> {
        let mut values: Vec<f64> = values.filter(|v| v.is_finite()).collect();
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let half = values.len() / 2;
        let upper = values[half];
        let median =
            if values.len().is_multiple_of(2) { f64::midpoint(values[half - 1], upper) } else { upper };
        Some(Spread { min, median, max })
    }

    /// In words.
    pub fn text(&self, digits: usize) -> String {
        let [min, median, max] = [self.min, self.median, self.max].map(|v| number(v, digits));
        format!("{min} / {median} / {max}")
    }
}

/// The spread of `a / b` over the rounds that have both. Each is a list of round and value.
pub fn ratios(a: &[(usize, f64)], b: &[(usize, f64)]) -> Option<Spread> {
    let other = |round: usize| b.iter().find(|(r, _)| *r == round).map(|(_, v)| *v);
    Spread::of(a.iter().filter_map(|(round, value)| Some(value / other(*round)?)))
}

/// A number with digits in groups of three.
pub fn number(value: f64, digits: usize) -> String {
    let plain = format!("{value:.digits$}");
    let (sign, plain) = plain.strip_prefix('-').map_or(("", plain.as_str()), |p| ("-", p));
    let (whole, rest) = plain.split_at(plain.find('.').unwrap_or(plain.len()));
    let mut grouped = String::from(sign);
    for (i, digit) in whole.chars().enumerate() {
        if i > 0 && (whole.len() - i).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_of_an_even_number_is_between_two() {
        let of = |values: &[f64]| Spread::of(values.iter().copied());
        assert_eq!(of(&[3.0, 1.0, 2.0]), Some(Spread { min: 1.0, median: 2.0, max: 3.0 }));
        assert_eq!(of(&[4.0, 1.0, 2.0, 3.0]), Some(Spread { min: 1.0, median: 2.5, max: 4.0 }));
        assert_eq!(of(&[7.0]), Some(Spread { min: 7.0, median: 7.0, max: 7.0 }));
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[f64::NAN, f64::INFINITY, 1.0]), Some(Spread { min: 1.0, median: 1.0, max: 1.0 }));
    }

    #[test]
    fn ratios_are_of_the_same_round_only() {
        let a = [(0, 10.0), (1, 30.0), (2, 5.0)];
        let b = [(2, 1.0), (0, 10.0)];
        assert_eq!(ratios(&a, &b), Some(Spread { min: 1.0, median: 3.0, max: 5.0 }));
        assert_eq!(ratios(&a, &[(7, 1.0)]), None);
        // A reference that used nothing gives no ratio.
        assert_eq!(ratios(&[(0, 1.0)], &[(0, 0.0)]), None);
    }

    #[test]
    fn numbers_are_grouped() {
        assert_eq!(number(1_234_567.891, 1), "1,234,567.9");
        assert_eq!(number(999.0, 0), "999");
        assert_eq!(number(-1000.5, 2), "-1,000.50");
        assert_eq!(Spread { min: 1.0, median: 2.0, max: 1000.0 }.text(0), "1 / 2 / 1,000");
    }
}
