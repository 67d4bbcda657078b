//! Network cards of a virtual machine.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::Vm;
use crate::accel::Accel;
use crate::wait;

/// How long the guest may take to find a card.
const PLUG_LIMIT: std::time::Duration = std::time::Duration::from_secs(40);

/// A virtio-net card with a vhost-user back end.
#[derive(Debug, Clone)]
pub struct Nic {
    id: String,
    pub(crate) socket: PathBuf,
    queues: usize,
    props: Map<String, Value>,
}

impl Nic {
    /// A card with one pair of queues, served at `socket`. `id` ends in a digit, which is the last of its address.
    pub fn new(id: &str, socket: &Path) -> Self {
        let nic = Self { id: id.to_owned(), socket: socket.to_owned(), queues: 1, props: Map::new() };
        let last = id.chars().last().filter(char::is_ascii_digit).unwrap_or('0');
        // Firmware to boot from it is a package of its own.
        nic.prop("mac", format!("52:54:00:00:00:0{last}")).prop("romfile", "")
    }

    /// Sets the number of queue pairs.
    #[must_use]
    pub fn queues(mut self, pairs: usize) -> Self {
        self.queues = pairs;
        self
    }

    /// Sets a property of the device: `packed`, `mrg_rxbuf`, `host_mtu`, or an offload such as `guest_tso4`.
    #[must_use]
    pub fn prop(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.props.insert(name.to_owned(), value.into());
        self
    }

    fn chardev(&self) -> String {
        format!("chr-{}", self.id)
    }

    pub(crate) fn chardev_arg(&self) -> String {
        format!("socket,id={},path={},reconnect=1", self.chardev(), self.socket.display())
    }

    fn netdev_id(&self) -> String {
        format!("net-{}", self.id)
    }

    pub(crate) fn netdev(&self) -> Value {
        json!({ "type": "vhost-user", "id": self.netdev_id(), "chardev": self.chardev(), "queues": self.queues })
    }

    /// As it is plugged into a machine whose devices have packed rings, or not.
    pub(crate) fn device(&self, packed: bool, accel: Accel) -> Value {
        // Vectors for all queues, control and configuration. Without KVM, QEMU 7.2 dies of them: unmasking a vector of
        // a vhost-user card looks for its irqfd, and there is none.
        let vectors = if accel == Accel::Kvm { 2 * self.queues + 2 } else { 0 };
        let mut device = json!({ "driver": "virtio-net-pci", "id": self.id, "netdev": self.netdev_id(),
            "mq": self.queues > 1, "vectors": vectors });
        if packed {
            device["packed"] = true.into();
        }
        for (name, value) in &self.props {
            device[name] = value.clone();
        }
        device
    }
}

impl Vm {
    /// Plugs a network card in; it is there when the guest shows one more interface.
    pub fn hotplug_nic(&mut self, nic: &Nic) -> Result<()> {
        let before = self.nic_count()?;
        let address = json!({ "type": "unix", "data": { "path": nic.socket.to_string_lossy() } });
        let backend =
            json!({ "type": "socket", "data": { "addr": address, "server": false, "reconnect": 1 } });
        self.qmp.execute("chardev-add", &json!({ "id": nic.chardev(), "backend": backend }))?;
        self.qmp.execute("netdev_add", &nic.netdev())?;
        self.qmp.execute("device_add", &nic.device(self.builder.packed, self.accel))?;
        wait::until("a network card in the guest", PLUG_LIMIT, || {
            Ok((self.nic_count()? == before + 1).then_some(()))
        })
    }

    /// Unplugs a network card, with the guest's consent, and drops the connection to its back end.
    pub fn unplug_nic(&mut self, nic: &Nic) -> Result<()> {
        self.unplug(&nic.id)?;
        // The connection goes with it.
        self.qmp.execute("netdev_del", &json!({ "id": nic.netdev_id() }))?;
        Ok(())
    }

    /// Pulls the cable of a card, or puts it back, as far as QEMU is concerned.
    pub fn set_link(&mut self, nic: &Nic, up: bool) -> Result<()> {
        self.qmp.execute("set_link", &json!({ "name": nic.id, "up": up }))?;
        Ok(())
    }

    fn nic_count(&mut self) -> Result<u64> {
        Ok(self.check("ls -d /sys/class/net/eth* 2>/dev/null | wc -l")?.parse()?)
    }
}
