//! A network card of the guest's own kernel, joined to a tap in another network namespace.

use anyhow::{Context, Result, ensure};
use kickless_tests::scene::Scene;
use serde_json::Value;

use crate::guest::{compare_with_iproute2, guest, prepare, said, serve, signal};

pub fn network_card(scene: &Scene) -> Result<Option<String>> {
    let mut vm = guest(scene)?.boot(scene)?;
    prepare(&mut vm)?;
    for (turn, more) in ["", " --packed off"].into_iter().enumerate() {
        let args = format!(
            "serve net --name card --tap t0 --mac 52:54:00:12:34:56 --mtu 1400 --driver virtio{more}"
        );
        let interface = serve(&mut vm, "card", &args)?;
        vm.check(&format!(
            "(ip netns list | grep -q far || ip netns add far) && ip link set t0 netns far && \
             ip -n far addr add 10.0.0.2/24 dev t0 && ip -n far link set t0 up && ip -n far link set lo up && \
             ip addr add 10.0.0.1/24 dev {interface} && ip link set {interface} up"
        ))?;
        let about = vm.check(&format!("ip link show {interface}"))?;
        ensure!(about.contains("mtu 1400") && about.contains("52:54:00:12:34:56"), "{about}");
        compare_with_iproute2(&mut vm)?;
        let config: Value = serde_json::from_str(&vm.check("vdpactl config --json")?)?;
        ensure!(config["config"]["card"]["mac"] == "52:54:00:12:34:56", "{config}");
        vm.check("ping -c 3 -W 10 10.0.0.2").with_context(|| said(&mut vm, "card"))?;
        vm.check("ping -c 2 -W 10 -s 6000 10.0.0.2")?;
        vm.check("ip netns exec far iperf3 -s -D -1 && sleep 1")?;
        let said = vm.check("iperf3 -c 10.0.0.2 -t 3 -J").with_context(|| said(&mut vm, "card"))?;
        let result: Value = serde_json::from_str(&said)?;
        let bytes = result["end"]["sum_received"]["bytes"].as_f64().unwrap_or(0.0);
        ensure!(bytes > 1e6, "turn {turn}: {bytes} bytes in three seconds");
        signal(&mut vm, "card", "TERM")?;
        vm.check("! test -e /dev/vduse/card && ! ip link show eth0 2>/dev/null")?;
    }
    vm.quit()?;
    Ok(None)
}
