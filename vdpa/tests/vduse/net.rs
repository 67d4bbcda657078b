//! Network cards, whose control queue kernels refuse so far.

use std::sync::Arc;

use poll_engine::device::Device;
use poll_engine::ring::driver::Buffer;
use vdpa::served::{create, forms};
use vdpa::vduse::node::{Control, ID_NET};
use vdpa::vduse::state::{About, State};
use vhost_net::device::{CONFIG_LEN, Card, Joined, NetDevice};
use vhost_net::features::{CTRL_VQ, MQ};
use vhost_net::hub::{Hub, Plan, Port};

use crate::kernel::Kernel;
use crate::rig::{RING, Rig};

const PAIRS: u16 = 2;

fn card() -> Arc<NetDevice> {
    let port = Arc::new(Port::new("card".into(), PAIRS, false));
    let hub = Arc::new(Hub::new(Plan::Echo, vec![port], 1));
    let card = Card { mac: Some([2, 0, 0, 0, 0, 1]), mtu: None, pairs: PAIRS, ring_size: RING };
    Arc::new(NetDevice::new(card, Joined::Hub(hub, 0), 0))
}

fn made(kernel: &Arc<Kernel>) -> About {
    let root = tempfile::tempdir().unwrap();
    let state = State::claim(root.path(), "card").unwrap();
    let control = Control::new(kernel.edge()).unwrap();
    let forms = forms(&*card(), ID_NET, CONFIG_LEN);
    let about = create(&control, &state, "card", &forms, &[0; CONFIG_LEN]).unwrap();
    // What a successor finds.
    state.resume(&about).unwrap();
    about
}

#[test]
fn a_control_queue_is_offered_to_kernels_that_take_one() {
    let kernel = Kernel::new(5, 0);
    let about = made(&kernel);
    assert_eq!((about.num_queues, about.features & (CTRL_VQ | MQ)), (2, 0), "Linux up to 7.2");
    kernel.lock().takes_control_queues = true;
    let about = made(&kernel);
    assert_eq!((about.num_queues, about.features & (CTRL_VQ | MQ)), (2 * PAIRS + 1, CTRL_VQ | MQ));
    let (_, id, features, queues, _) = kernel.lock().created.clone().unwrap();
    assert_eq!((id, features, queues), (ID_NET, about.features, 5));
    // Whatever else it refuses is said.
    kernel.lock().refuses = Some(libc::EPERM);
    let root = tempfile::tempdir().unwrap();
    let state = State::claim(root.path(), "card").unwrap();
    assert!(Control::new(kernel.edge()).is_err());
    kernel.lock().refuses = None;
    let control = Control::new(kernel.edge()).unwrap();
    kernel.lock().refuses = Some(libc::EPERM);
    let refused = create(&control, &state, "card", &forms(&*card(), ID_NET, CONFIG_LEN), &[0; CONFIG_LEN]);
    assert!(refused.unwrap_err().to_string().contains("CAP_NET_ADMIN"));
}

/// The driver chooses pairs of queues, by either form of ring.
#[test]
fn pairs_are_chosen_in_the_control_queue() {
    let card = card();
    let about = forms(&*card, ID_NET, CONFIG_LEN).swap_remove(0);
    for features in [about.features, about.features & !(1 << 34)] {
        let mut rig = Rig::of(about.clone(), features, Arc::clone(&card) as Arc<dyn Device>);
        rig.serve(false);
        let mut driver = rig.drive();
        let control = 2 * usize::from(PAIRS);
        for index in 1..=control {
            driver.ready(index);
        }
        driver.bounce();
        for (pairs, answer) in [(1u16, 0u8), (PAIRS, 0), (PAIRS + 1, 1), (0, 1)] {
            // VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET.
            let command = [4, 0, pairs as u8, 0];
            driver.data.map().slice(0x100, 4).unwrap().write(&command);
            driver.data.map().slice(0x200, 1).unwrap().write(&[0xff]);
            let buffers = [
                Buffer { addr: 0x100, len: 4, writable: false },
                Buffer { addr: 0x200, len: 1, writable: true },
            ];
            driver.queues[control].add(&buffers).unwrap();
            driver.queues[control].publish();
            rig.kernel.kick(control);
            assert_eq!(driver.wait(control), Some(answer), "{pairs} pairs");
        }
        assert!(rig.kernel.set_status(0));
    }
}
