package relay

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/mantlet/mantlet/xds/names"
)

// onDemandName is the cluster that stands for a destination: od|IP:PORT.
func onDemandName(dest netip.AddrPort) string {
	return names.OnDemandPrefix + netip.AddrPortFrom(dest.Addr().Unmap().WithZone(""), dest.Port()).String()
}

// onDemand reports whether a resource is an on-demand cluster.
func onDemand(typeURL, name string) bool {
	return typeURL == TypeCluster && strings.HasPrefix(name, names.OnDemandPrefix)
}

// countEndpoints counts the endpoints of an on-demand cluster: whether the pod may connect there is all that the agent reads of a resource that is
// Envoy's. It is strict: what could give the endpoints another meaning is an error, and an error admits nobody. The numbers are those of
// envoy/config/cluster/v3/cluster.proto and envoy/config/endpoint/v3.
func countEndpoints(r *resource) (n int, err error) {
	if r.typeURL != TypeCluster {
		return 0, fmt.Errorf("%q is a %s, not a cluster", r.name, r.typeURL)
	}
	var name string
	assignments := 0
	err = eachField(r.value, func(num protowire.Number, kind protowire.Type, v []byte) error {
		switch {
		case num == 1 && kind == protowire.BytesType:
			name = string(v)
		case num == 2: // type: STATIC is 0
			if discovery, m := protowire.ConsumeVarint(v); m < 0 || discovery != 0 {
				return errors.New("its endpoints are not in it: it is not STATIC")
			}
		case num == 38:
			return errors.New("its endpoints are not in it: it has a cluster_type")
		case num == 33 && kind == protowire.BytesType:
			assignments++
			m, err := assigned(v, r.name)
			n += m
			return err
		}
		return nil
	})
	switch {
	case err != nil:
		return 0, fmt.Errorf("cluster %q: %w", r.name, err)
	case name != r.name:
		return 0, fmt.Errorf("cluster %q calls itself %q", r.name, name)
	case assignments != 1:
		return 0, fmt.Errorf("cluster %q has %d load assignments, not one", r.name, assignments)
	}
	return n, nil
}

// assigned counts the endpoints of a ClusterLoadAssignment.
func assigned(b []byte, cluster string) (n int, err error) {
	err = eachField(b, func(num protowire.Number, kind protowire.Type, v []byte) error {
		switch {
		case num == 1 && kind == protowire.BytesType && string(v) == cluster:
			return nil
		case num == 2 && kind == protowire.BytesType: // LocalityLbEndpoints: beside its endpoints it may have locality, weight and priority
			return eachField(v, func(num protowire.Number, kind protowire.Type, v []byte) error {
				switch {
				case num == 1 || num == 3 || num == 5:
					return nil
				case num == 2 && kind == protowire.BytesType:
					n++
					return endpoint(v)
				}
				return fmt.Errorf("a locality has a field %d", num)
			})
		}
		return fmt.Errorf("the load assignment has a field %d that is not expected", num)
	})
	return n, err
}

// endpoint wants an LbEndpoint that has an address of its own; metadata and weight may stand beside it.
func endpoint(b []byte) error {
	found := 0
	err := eachField(b, func(num protowire.Number, kind protowire.Type, v []byte) error {
		switch {
		case num == 3 || num == 4:
			return nil
		case num == 1 && kind == protowire.BytesType && len(v) > 0:
			found++
			return nil
		}
		return fmt.Errorf("an endpoint has a field %d that is not expected", num)
	})
	if err == nil && found != 1 {
		return errors.New("an endpoint has no address")
	}
	return err
}
