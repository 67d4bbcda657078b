//! The switch beside models that say the same in fewer words and more time.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use vhost_net::mac::MacAddr;
use vhost_net::switch::fdb::{Fdb, FdbConfig, Learnt};
use vhost_net::switch::limit::{Limiter, Rate};
use vhost_net::switch::vlan::{TagAction, Vlan};
use vhost_net::switch::{DropReason, Frame, PortConfig, PortId, Shard, Switch, Verdict};

const SECOND: u64 = 1_000_000_000;
const AGEING: u64 = 300;

/// A frame with a payload of zeros.
fn frame(dst: u64, src: u64, vid: Option<u16>) -> Vec<u8> {
    let mut frame = [MacAddr::from_u64(dst).0, MacAddr::from_u64(src).0].concat();
    frame.extend(vid.into_iter().flat_map(|vid| [0x81, 0, (vid >> 8) as u8, vid as u8]));
    frame.extend([0x88, 0xb5]);
    frame.resize(60, 0);
    frame
}

fn decide(shard: &mut Shard, from: u16, bytes: &[u8], now: u64) -> Verdict {
    shard.decide(PortId(from), &Frame::whole(bytes, bytes.len() as u32), now)
}

/// The ports that a frame goes to, sorted.
fn ports(shard: &Shard, verdict: Verdict, now: u64) -> Vec<(u16, TagAction)> {
    match verdict {
        Verdict::Drop(_) => vec![],
        Verdict::One(port, action) => vec![(port.0, action)],
        Verdict::Flood(flood) => shard.egress(flood, now).map(|(port, action)| (port.0, action)).collect(),
    }
}

fn switch(configs: &[PortConfig]) -> (Arc<Switch>, Shard) {
    let switch = Arc::new(Switch::new(FdbConfig::default(), configs, 1));
    (0..configs.len() as u16).for_each(|port| switch.set_link(PortId(port), true));
    let shard = switch.shard(0);
    (switch, shard)
}

fn plain(n: usize) -> Vec<PortConfig> {
    (0..n).map(|i| PortConfig::new(format!("port{i}"))).collect()
}

#[derive(Clone, Debug)]
enum Step {
    Learn { mac: u64, port: u16 },
    Wait { seconds: u64 },
    Close { port: u16 },
    Open { port: u16 },
    Pin { mac: u64, port: u16 },
}

fn step() -> impl Strategy<Value = Step> {
    let (mac, port) = (1..24u64, 0..4u16);
    prop_oneof![
        12 => (mac.clone(), port.clone()).prop_map(|(mac, port)| Step::Learn { mac, port }),
        3 => (1..200u64).prop_map(|seconds| Step::Wait { seconds }),
        1 => port.clone().prop_map(|port| Step::Close { port }),
        1 => port.clone().prop_map(|port| Step::Open { port }),
        1 => (mac, port).prop_map(|(mac, port)| Step::Pin { mac, port }),
    ]
}

/// A map with the time an address was last seen; `None` is for ever.
#[derive(Default)]
struct Model(HashMap<u64, (u16, Option<u64>)>);

impl Model {
    fn count(&self, port: u16) -> usize {
        self.0.values().filter(|(p, _)| *p == port).count()
    }

    fn learn(&mut self, mac: u64, port: u16, now: u64, is_open: bool, limit: usize) -> Learnt {
        let full = self.count(port) >= limit;
        match self.0.get_mut(&mac) {
            Some((own, seen)) if *own == port => {
                *seen = seen.map(|_| now);
                Learnt::Known
            }
            _ if !is_open => Learnt::Closed,
            _ if full => Learnt::PortFull,
            Some((_, None)) => Learnt::Pinned,
            old => {
                let from = old.map(|(from, _)| *from);
                self.0.insert(mac, (port, Some(now)));
                from.map_or(Learnt::New, |from| Learnt::Moved(PortId(from)))
            }
        }
    }
}

proptest! {
    /// Except that ageing has a grain, of a twelfth.
    #[test]
    fn the_table_is_a_map_that_forgets(steps in proptest::collection::vec(step(), 1..200)) {
        const LIMITS: [u32; 4] = [3, 8, 100, 100];
        let fdb = Fdb::new(FdbConfig::default(), LIMITS);
        let (mut model, mut open, mut now) = (Model::default(), [false; 4], 5 * SECOND);
        for step in steps {
            let (period, _) = fdb.age(now).unwrap();
            match step {
                Step::Learn { mac, port } => {
                    let learnt = fdb.learn(fdb.key(7, mac), PortId(port), period);
                    let at = usize::from(port);
                    prop_assert_eq!(learnt, model.learn(mac, port, now, open[at], LIMITS[at] as usize));
                }
                Step::Wait { seconds } => {
                    now += seconds * SECOND;
                    fdb.age(now).unwrap();
                    for mac in 1..24 {
                        let Some(&(port, Some(seen))) = model.0.get(&mac) else { continue };
                        let (idle, known) = ((now - seen) / SECOND, fdb.lookup(fdb.key(7, mac)));
                        let must = idle < AGEING && known.is_some() || idle > AGEING * 13 / 12 && known.is_none();
                        prop_assert!(must || (AGEING..=AGEING * 13 / 12).contains(&idle), "{known:?} after {idle} s");
                        if known.is_none() {
                            prop_assert_eq!(model.0.remove(&mac).map(|(p, _)| p), Some(port));
                        }
                    }
                }
                Step::Close { port } => {
                    fdb.close(PortId(port));
                    open[usize::from(port)] = false;
                    model.0.retain(|_, (p, seen)| *p != port || seen.is_none());
                }
                Step::Open { port } => {
                    fdb.open(PortId(port));
                    open[usize::from(port)] = true;
                }
                Step::Pin { mac, port } => {
                    prop_assert!(fdb.pin(fdb.key(7, mac), PortId(port)));
                    model.0.insert(mac, (port, None));
                }
            }
            for mac in 1..24 {
                let expected = model.0.get(&mac).map(|&(port, _)| PortId(port));
                prop_assert_eq!(fdb.lookup(fdb.key(7, mac)), expected, "of {}", mac);
                prop_assert_eq!(fdb.lookup(fdb.key(8, mac)), None, "another VLAN");
            }
            for port in 0..4 {
                prop_assert_eq!(fdb.entries(PortId(port)) as usize, model.count(port));
            }
        }
        let mut dump: Vec<_> = fdb.dump().map(|e| (e.vid, e.mac.to_u64(), e.port.0, e.is_static)).collect();
        let mut expected: Vec<_> = model.0.iter().map(|(&m, &(p, seen))| (7, m, p, seen.is_none())).collect();
        dump.sort_unstable();
        expected.sort_unstable();
        prop_assert_eq!(dump, expected);
    }

    /// In no stretch of time does more pass than the rate, a burst and one frame.
    #[test]
    fn no_stretch_of_time_sees_more_than_its_rate(
        gaps in proptest::collection::vec((0..20_000_000u64, 1..3u32, 60..9000u32), 1..120),
        bits in 100_000..1_000_000_000u64,
        packets in 10..1_000_000u64,
        burst_ms in 0..50u64,
    ) {
        let burst = Some(Duration::from_millis(burst_ms));
        let limiter = Limiter::new(Rate { packets: Some(packets), bits: Some(bits), burst }).unwrap();
        let mut now = 1000;
        let mut passed = vec![];
        for (gap, n, bytes) in gaps {
            now += gap;
            let is_open = limiter.is_open(now);
            prop_assert_eq!(limiter.take(now, n, bytes), is_open);
            prop_assert!(is_open || limiter.open_at() > now);
            if is_open {
                passed.push((now, u64::from(n), 8 * u64::from(bytes)));
            }
        }
        for first in 0..passed.len() {
            let (mut sum_packets, mut sum_bits) = (0, 0);
            for &(at, n, b) in &passed[first..] {
                // Before this one, within what the time and the burst allow.
                let seconds = (at - passed[first].0) as f64 / 1e9 + burst_ms as f64 / 1e3;
                prop_assert!(sum_packets as f64 <= packets as f64 * seconds * 1.000_001 + 1e-3);
                prop_assert!(sum_bits as f64 <= bits as f64 * seconds * 1.000_001 + 1e-3);
                (sum_packets, sum_bits) = (sum_packets + n, sum_bits + b);
            }
        }
    }

    /// Any bytes at all, from any port.
    #[test]
    fn no_bytes_bring_it_down(bytes in proptest::collection::vec(any::<u8>(), 0..160), kind in 0..6usize, at in 0..40usize) {
        let mut configs = plain(3);
        configs[0].vlan = Vlan::Access(5);
        configs[0].guard.macs = vec![MacAddr([2; 6])];
        configs[0].guard.ips = vec!["10.0.0.0/8".parse().unwrap()];
        configs[1].guard.macs = vec![MacAddr([2; 6])];
        let (_, mut shard) = switch(&configs);
        // Most of it is to come further than the first check.
        let ethertypes = [[0x08, 0x00], [0x08, 0x06], [0x86, 0xdd], [0x81, 0x00], [0x80, 0x35]];
        let mut bytes = bytes;
        if let (Some(&ethertype), true) = (ethertypes.get(kind), bytes.len() > 20) {
            bytes[6..12].fill(2);
            bytes[12..14].copy_from_slice(&ethertype);
            bytes[14] = if kind == 2 { 0x60 } else { bytes[14] };
            if bytes.len() > 14 + 40 && kind == 2 {
                bytes[20] = [58, 0, 43, 60, 44, 51][at % 6];
                bytes[22..38].fill(0);
            }
        }
        for from in 0..3 {
            let verdict = decide(&mut shard, from, &bytes, 1);
            prop_assert!(ports(&shard, verdict, 1).iter().all(|&(to, _)| to != from));
        }
    }
}

/// Every sequence of three frames among three stations, each on its own port or moving to another: where a frame goes is
/// where its destination was last heard of, or everywhere else. Which port and station come first makes no difference.
#[test]
fn short_histories_end_where_a_bridge_would() {
    const STATIONS: [u64; 3] = [0x10, 0x11, 0x12];
    let frames: Vec<(u16, u64, u64)> = (0..3u16)
        .flat_map(|from| STATIONS.map(|src| (from, src)))
        .flat_map(|(from, src)| {
            STATIONS.into_iter().chain([0xffff_ffff_ffff]).map(move |dst| (from, src, dst))
        })
        .collect();
    let mut histories = 0;
    for first in &frames[..4] {
        for second in &frames {
            for third in &frames {
                let (_, mut shard) = switch(&plain(3));
                let mut heard: HashMap<u64, u16> = HashMap::new();
                for &(from, src, dst) in [first, second, third] {
                    let bytes = frame(dst, src, None);
                    let verdict = decide(&mut shard, from, &bytes, 1);
                    heard.insert(src, from);
                    let to: Vec<u16> = ports(&shard, verdict, 1).iter().map(|&(port, _)| port).collect();
                    match heard.get(&dst) {
                        Some(&port) if port == from => {
                            assert_eq!(verdict, Verdict::Drop(DropReason::SamePort));
                        }
                        Some(&port) => assert_eq!(to, [port]),
                        None => assert_eq!(to, (0..3).filter(|&p| p != from).collect::<Vec<_>>()),
                    }
                }
                histories += 1;
            }
        }
    }
    assert_eq!(histories, 4 * 36 * 36);
}

/// Every pair of ports of five kinds of VLAN membership and two of isolation, each up or down: what is flooded, and what
/// is sent to a known address, arrives where both are in the VLAN, up and not both isolated, and nowhere else.
#[test]
fn rules_decide_where_frames_arrive_known_or_not() {
    let trunk = |native, allowed: &str| Vlan::Trunk { native, allowed: allowed.parse().unwrap() };
    let vlans = [Vlan::default(), Vlan::Access(5), Vlan::Access(6), trunk(None, "5,6"), trunk(Some(5), "6")];
    let mut configs = vec![];
    for is_isolated in [false, true] {
        for vlan in &vlans {
            configs.push(PortConfig { vlan: vlan.clone(), is_isolated, ..PortConfig::new("port") });
        }
    }
    let count = configs.len() as u16;
    let (mut arrived, mut kept) = (0, 0);
    for down in (0..count).map(Some).chain([None]) {
        let (switch, mut shard) = switch(&configs);
        if let Some(down) = down {
            switch.set_link(PortId(down), false);
        }
        for from in 0..count {
            for vid in [None, Some(5), Some(6), Some(7)] {
                let (a, b) = (&configs[usize::from(from)], |to: u16| &configs[usize::from(to)]);
                let tag = vid.map(|vid| vhost_net::switch::vlan::Tag { tci: vid, is_stacked: false });
                let vlan = a.vlan.admit(tag);
                let may = |to: u16| {
                    let is_up = down != Some(from) && down != Some(to);
                    let is_member = vlan.is_ok_and(|vid| b(to).vlan.emit(vid, tag).is_ok());
                    to != from && is_up && is_member && !(a.is_isolated && b(to).is_isolated)
                };
                let all: Vec<u16> = (0..count).filter(|&to| may(to)).collect();
                let verdict = decide(&mut shard, from, &frame(0xffff_ffff_ffff, 0x100, vid), 1);
                let to: HashSet<u16> = ports(&shard, verdict, 1).iter().map(|&(port, _)| port).collect();
                assert_eq!(to, all.iter().copied().collect(), "{vid:?} from {from}, {down:?} down");
                for to in 0..count {
                    // The destination has sent in this VLAN, as far as it may.
                    let Ok(vid_of_frame) = vlan else { continue };
                    let known = 0x200 + u64::from(to);
                    switch.pin(PortId(to), vid_of_frame, MacAddr::from_u64(known));
                    let verdict = decide(&mut shard, from, &frame(known, 0x100, vid), 1);
                    let reached: Vec<u16> = ports(&shard, verdict, 1).iter().map(|&(port, _)| port).collect();
                    assert_eq!(reached, Vec::from_iter(may(to).then_some(to)), "{vid:?} {from} to {to}");
                    *if may(to) { &mut arrived } else { &mut kept } += 1;
                }
            }
        }
    }
    assert!(arrived > 100 && kept > 100, "{arrived} {kept}");
}

#[test]
fn what_bridges_keep_to_themselves_goes_nowhere() {
    let (switch, mut shard) = switch(&plain(2));
    for low in 0..16 {
        let verdict = decide(&mut shard, 0, &frame(0x0180_c200_0000 + low, 1, None), 1);
        assert_eq!(verdict, Verdict::Drop(DropReason::ReservedGroup));
    }
    assert!(matches!(decide(&mut shard, 0, &frame(0x0180_c200_0010, 1, None), 1), Verdict::Flood(_)));
    for (src, reason) in [(0, DropReason::BadSource), (0x0100_0000_0000, DropReason::BadSource)] {
        assert_eq!(decide(&mut shard, 0, &frame(2, src, None), 1), Verdict::Drop(reason));
    }
    for len in 0..14 {
        assert_eq!(decide(&mut shard, 0, &frame(2, 1, None)[..len], 1), Verdict::Drop(DropReason::Runt));
    }
    assert_eq!(decide(&mut shard, 0, &frame(2, 1, Some(5))[..17], 1), Verdict::Drop(DropReason::Runt));
    assert_eq!(switch.drops(PortId(0), DropReason::ReservedGroup), 16);
    assert_eq!(switch.drops(PortId(0), DropReason::Runt), 15);
}

#[test]
fn a_port_gets_no_longer_packets_than_its_mtu() {
    let mut configs = plain(3);
    configs[1].mtu = 1500;
    let (switch, mut shard) = switch(&configs);
    let port = |shard: &mut Shard, longest, vid| {
        let bytes = frame(0xffff_ffff_ffff, 1, vid);
        let frame = Frame { head: &bytes, len: 65000, packets: 45, longest };
        let verdict = shard.decide(PortId(0), &frame, 1);
        ports(shard, verdict, 1).iter().map(|&(port, _)| port).collect::<Vec<_>>()
    };
    assert_eq!(port(&mut shard, 1514, None), [1, 2]);
    assert_eq!(port(&mut shard, 1518, Some(5)), [1, 2]);
    assert_eq!(port(&mut shard, 1515, None), [2]);
    assert_eq!(port(&mut shard, 1519, Some(5)), [2]);
    assert_eq!(switch.drops(PortId(1), DropReason::TooLong), 2);
}

#[test]
fn limits_stop_storms_and_senders_each_by_its_own() {
    let mut configs = plain(3);
    configs[0].storm.broadcast = Some(1000);
    configs[0].storm.unknown = Some(2000);
    configs[1].ingress = Rate { packets: Some(1000), ..Rate::default() };
    configs[2].egress = Rate { packets: Some(1000), ..Rate::default() };
    let (switch, mut shard) = switch(&configs);
    let passed = |shard: &mut Shard, from, dst| {
        let bytes = frame(dst, 0x10 + u64::from(from), None);
        (0..100).filter(|_| !matches!(decide(shard, from, &bytes, 1), Verdict::Drop(_))).count()
    };
    assert_eq!(passed(&mut shard, 0, 0xffff_ffff_ffff), 11, "10 ms and the one that overdraws");
    assert_eq!(passed(&mut shard, 0, 0x99), 21);
    assert_eq!(passed(&mut shard, 0, 0x0100_5e00_0001), 100, "no limit");
    assert!(shard.may_send(PortId(1), 1));
    assert_eq!(passed(&mut shard, 1, 0x99), 11);
    assert!(!shard.may_send(PortId(1), 1) && shard.may_send(PortId(1), shard.may_send_at(PortId(1))));
    // A known station behind the port that gets little; what was flooded before was for it, too, so that nothing is left.
    decide(&mut shard, 2, &frame(0xffff_ffff_ffff, 0x12, None), 1);
    assert_eq!(passed(&mut shard, 0, 0x12), 11);
    let drops = |port, reason| switch.drops(PortId(port), reason);
    assert_eq!(drops(0, DropReason::BroadcastStorm), 89);
    assert_eq!(drops(0, DropReason::UnknownStorm), 79);
    assert_eq!(drops(1, DropReason::RateLimit), 89);
    assert_eq!(drops(2, DropReason::EgressRateLimit), 89);
}

#[test]
fn a_guest_that_sprays_addresses_fills_its_own_share_only() {
    let mut configs = plain(3);
    configs[0].max_addresses = 64;
    let (switch, mut shard) = switch(&configs);
    for station in 0..1000 {
        decide(&mut shard, 1, &frame(0xffff_ffff_ffff, 0x10_0000 + station, None), 1);
    }
    for station in 0..100_000 {
        decide(&mut shard, 0, &frame(0xffff_ffff_ffff, 0x20_0000 + station, None), 1);
    }
    assert_eq!((switch.fdb().entries(PortId(0)), switch.fdb().entries(PortId(1))), (64, 1000));
    let counters: HashMap<_, _> = switch.counters(PortId(0)).into_iter().collect();
    assert_eq!((counters["fdb_learnt"], counters["fdb_not_learnt"]), (64, 100_000 - 64));
}

#[test]
fn a_port_that_goes_down_is_forgotten_and_a_quiet_station_is_too() {
    let (switch, mut shard) = switch(&plain(3));
    let to = |shard: &mut Shard, now| {
        let verdict = decide(shard, 0, &frame(0x11, 0x10, None), now);
        ports(shard, verdict, now).len()
    };
    decide(&mut shard, 1, &frame(0x10, 0x11, None), 1);
    assert_eq!(to(&mut shard, 1), 1);
    switch.set_link(PortId(1), false);
    assert_eq!(to(&mut shard, 1), 1, "flooded, to the one that is left");
    switch.set_link(PortId(1), true);
    assert_eq!(to(&mut shard, 1), 2, "flooded");
    decide(&mut shard, 1, &frame(0x10, 0x11, None), 1);
    assert_eq!(to(&mut shard, 299 * SECOND), 1);
    assert_eq!(to(&mut shard, 326 * SECOND), 2);
}

/// Reactors that learn, look up and age at the same time, and a control thread that takes ports up and down: an address is
/// found behind a port that it was learnt from, or not at all, and in the end every entry is counted once.
#[test]
fn shards_share_what_they_learn() {
    const PORTS: u16 = 8;
    const FRAMES: u64 = 40_000;
    let switch = Arc::new(Switch::new(FdbConfig::default(), &plain(usize::from(PORTS)), 3));
    (0..PORTS).for_each(|port| switch.set_link(PortId(port), true));
    std::thread::scope(|scope| {
        for shard in 0..3 {
            let mut shard = switch.shard(shard);
            scope.spawn(move || {
                for i in 0..FRAMES {
                    // Address n is heard from ports n and n + 1, never from others.
                    let (src, dst) = (i * 7 % 64, i * 13 % 64);
                    let from = ((src + i % 2) % u64::from(PORTS)) as u16;
                    let verdict =
                        decide(&mut shard, from, &frame(0x100 + dst, 0x100 + src, None), i * SECOND / 100);
                    if let Verdict::One(to, _) = verdict {
                        let behind = (u64::from(to.0) + 64 - dst) % u64::from(PORTS);
                        assert!(behind < 2, "{dst} behind port {}", to.0);
                    }
                }
            });
        }
        scope.spawn(|| {
            for i in 0..200 {
                let port = PortId(i % PORTS);
                switch.set_link(port, false);
                assert_eq!(switch.fdb().dump().filter(|e| e.port == port).count(), 0);
                switch.set_link(port, true);
            }
        });
    });
    for port in 0..PORTS {
        let listed = switch.fdb().dump().filter(|e| e.port.0 == port).count();
        assert_eq!(switch.fdb().entries(PortId(port)) as usize, listed);
    }
    let distinct: HashSet<_> = switch.fdb().dump().map(|e| e.mac).collect();
    assert_eq!(distinct.len(), switch.fdb().dump().count(), "no address twice");
}

#[test]
fn limits_that_stay_the_same_go_on_when_rules_change() {
    let rate = |packets| Rate { packets: Some(packets), bits: None, burst: Some(Duration::ZERO) };
    let config = PortConfig { ingress: rate(1), ..PortConfig::new("a") };
    let (switch, mut shard) = switch(&[config.clone(), PortConfig::new("b")]);
    let bytes = frame(0xffff_ffff_ffff, 2, None);
    let limited = Verdict::Drop(DropReason::RateLimit);
    assert_ne!(decide(&mut shard, 0, &bytes, 1), limited);
    switch.set_rules(PortId(0), PortConfig { is_isolated: true, ..config.clone() });
    shard.adopt();
    assert_eq!(decide(&mut shard, 0, &bytes, 2), limited, "it has sent its packet of this second");
    switch.set_rules(PortId(0), PortConfig { ingress: rate(2), ..config });
    assert_eq!(decide(&mut shard, 0, &bytes, 3), limited, "not adopted yet");
    shard.adopt();
    assert_ne!(decide(&mut shard, 0, &bytes, 4), limited);
}

#[test]
fn a_guard_that_changes_gives_up_the_address_it_had() {
    let guard = |mac| {
        let guard = vhost_net::switch::guard::GuardConfig {
            macs: vec![MacAddr::from_u64(mac)],
            ..Default::default()
        };
        PortConfig { guard, ..PortConfig::new("a") }
    };
    let (switch, mut shard) = switch(&[guard(2), PortConfig::new("b")]);
    let found = |mac| switch.fdb().lookup(switch.fdb().key(0, mac));
    assert_eq!(found(2), Some(PortId(0)));
    switch.set_rules(PortId(0), guard(4));
    shard.adopt();
    assert_eq!((found(2), found(4)), (None, Some(PortId(0))));
    assert_eq!(decide(&mut shard, 0, &frame(6, 2, None), 1), Verdict::Drop(DropReason::GuardMac));
}
