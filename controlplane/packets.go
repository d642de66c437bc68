package controlplane

import (
	"net/netip"
	"weak"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/verdict/wire"
	"github.com/mantlet/mantlet/xds/names"
	"github.com/mantlet/mantlet/xds/server"
)

// packets are the packet policies that are published, by subject key and by the node's addresses: replicas on a node share one.
type packets map[string]map[string]packetPolicy

type packetPolicy struct {
	value    *verdict.Packets // as the index gave it: the same pointer is the same value
	resource *server.Resource
}

// packetResources are the resources of values, as long as somebody is sent them: pods of many subjects may have the very same, of which one that lists
// all pods of a large cluster has a hundred kilobytes.
type packetResources map[weak.Pointer[verdict.Packets]]weak.Pointer[server.Resource]

// fewResources is how many are kept without looking whether they are of use.
const fewResources = 64

// of returns the resource of a value.
func (r packetResources) of(v *verdict.Packets) (*server.Resource, error) {
	key := weak.Make(v)
	if is := r[key].Value(); is != nil {
		return is, nil
	}
	made, err := server.NewResource(names.Packets, wire.PacketsMessage(v))
	if err != nil {
		return nil, err
	}
	r[key] = weak.Make(made)
	return made, nil
}

// sweep takes out those of values that are gone.
func (r packetResources) sweep() {
	for v, made := range r {
		if v.Value() == nil || made.Value() == nil {
			delete(r, v)
		}
	}
}

// packetsOf returns the resource with a pod's packet policy. It is the very same as before where its bytes are.
func (cp *ControlPlane) packetsOf(p policy.Pod) (*server.Resource, error) {
	value := cp.index.Packets(p.Name)
	key, node := p.Subject.Key, nodeKey(p.NodeIPs)
	is := cp.packets[key][node]
	if is.value == value {
		return is.resource, nil
	}
	r, err := cp.resources.of(value)
	if err != nil {
		return nil, err
	}
	if is.resource == nil || is.resource.Version != r.Version {
		is.resource = r
	}
	is.value = value
	if cp.packets[key] == nil {
		cp.packets[key] = map[string]packetPolicy{}
	}
	cp.packets[key][node] = is
	return is.resource, nil
}

// nodeKey is equal for equal addresses of a node.
func nodeKey(addrs []netip.Addr) string {
	b := make([]byte, 0, 64)
	for _, a := range addrs {
		b = append(a.AppendTo(b), ' ')
	}
	return string(b)
}

// publishPackets publishes to the pods whose packet policy may be another one than before. It reaches those for whom it is.
func (cp *ControlPlane) publishPackets(pods []string) error {
	if n := len(cp.resources); n >= max(cp.sweepPackets, fewResources) {
		cp.resources.sweep()
		cp.sweepPackets = 2 * len(cp.resources)
	}
	for _, name := range pods {
		if p, ok := cp.index.Pod(name); ok {
			if err := cp.publishPod(p); err != nil {
				return err
			}
		}
	}
	return nil
}
