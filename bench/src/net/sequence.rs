//! Which numbers of a flow have arrived: what is missing, late or there twice.

/// What an arrival was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// Later than all before it in its flow.
    Next,
    /// After one that was sent later: reordered (RFC 4737).
    Late,
    /// There already.
    Twice,
}

/// Bits in all, and those of a flow at least.
const BITS: usize = 1 << 18;
const LEAST: usize = 256;

/// The flows of one stream. Of each, a window of numbers behind the latest is remembered; what comes from before it is
/// late, and could be a duplicate.
#[derive(Clone, Debug)]
pub struct Flows {
    next: Vec<u32>,
    seen: Vec<u64>,
    /// Bits of the window of each.
    window: usize,
}

impl Flows {
    /// `n` flows of which nothing has arrived.
    pub fn new(n: usize) -> Flows {
        let window = (BITS / n.next_power_of_two()).clamp(LEAST, 1 << 16);
        Flows { next: vec![0; n], seen: vec![0; n * window / 64], window }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.next.fill(0);
        self.seen.fill(0);
    }

    /// Number `sequence` of a flow is there; `None` if there is no such flow.
    #[inline]
    pub fn arrive(&mut self, flow: usize, sequence: u32) -> Option<Arrival> {
        let next = self.next.get_mut(flow)?;
        let words = self.window / 64;
        let seen = &mut self.seen[flow * words..][..words];
        let place = |n: u32| ((n as usize / 64) & (words - 1), 1u64 << (n % 64));
        let (word, bit) = place(sequence);
        // Numbers wrap around; half of them are ahead.
        let ahead = sequence.wrapping_sub(*next);
        if ahead < 1 << 31 {
            if ahead as usize >= self.window {
                seen.fill(0);
            } else {
                for skipped in 0..ahead {
                    let (word, bit) = place(next.wrapping_add(skipped));
                    seen[word] &= !bit;
                }
            }
            seen[word] |= bit;
            *next = sequence.wrapping_add(1);
            return Some(Arrival::Next);
        }
        let behind = next.wrapping_sub(sequence) as usize;
        if behind > self.window {
            return Some(Arrival::Late);
        }
        let twice = seen[word] & bit != 0;
        seen[word] |= bit;
        Some(if twice { Arrival::Twice } else { Arrival::Late })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Arrival::{Late, Next, Twice};

    fn arrivals(flows: &mut Flows, numbers: &[u32]) -> Vec<Arrival> {
        numbers.iter().filter_map(|n| flows.arrive(0, *n)).collect()
    }

    #[test]
    fn order_gaps_and_repeats_are_told_apart() {
        let mut flows = Flows::new(1);
        assert_eq!(
            arrivals(&mut flows, &[0, 1, 3, 2, 2, 3, 4, 9, 4, 8]),
            [Next, Next, Next, Late, Twice, Twice, Next, Next, Twice, Late]
        );
        flows.clear();
        assert_eq!(arrivals(&mut flows, &[0, 0]), [Next, Twice]);
    }

    #[test]
    fn flows_do_not_know_each_other() {
        let mut flows = Flows::new(3);
        for flow in 0..3 {
            assert_eq!((flows.arrive(flow, 0), flows.arrive(flow, 0)), (Some(Next), Some(Twice)));
        }
        assert_eq!(flows.arrive(3, 0), None);
    }

    #[test]
    fn a_window_that_goes_round_forgets_what_was_there() {
        let mut flows = Flows::new(1 << 20);
        let window = flows.window as u32;
        assert_eq!(window as usize, LEAST);
        for n in 0..3 * window {
            // Every third is missing.
            if n % 3 != 0 {
                assert_eq!(flows.arrive(5, n), Some(Next), "{n}");
            }
        }
        for n in 2 * window..3 * window {
            let expected = if n % 3 == 0 { Late } else { Twice };
            assert_eq!(flows.arrive(5, n), Some(expected), "{n}");
        }
        assert_eq!(flows.arrive(5, 1), Some(Late));
        // A jump beyond the window leaves nothing of before.
        assert_eq!(
            (flows.arrive(5, 100 * window), flows.arrive(5, 99 * window + 1)),
            (Some(Next), Some(Late))
        );
    }

    #[test]
    fn numbers_wrap_around() {
        let mut flows = Flows::new(1);
        flows.next[0] = u32::MAX - 1;
        assert_eq!(
            arrivals(&mut flows, &[u32::MAX - 1, u32::MAX, 0, 2, 1, u32::MAX]),
            [Next, Next, Next, Next, Late, Twice]
        );
    }
}
