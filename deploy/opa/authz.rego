# What anybody may do with an OPA server that decides for keybroker: ask for a decision, and whether it is well. Nobody may write.
package system.authz

default allow := false

allow if {
	input.method == "POST"
	input.path == ["v1", "data", "keybroker", "decision"]
}

allow if {
	input.method == "GET"
	input.path == ["health"]
}
